"""What the model does on the calibration text: inputs of every group, and how much the output cares about each of them.

Forward, block by block, one block in float32 at a time: the Gram matrix of every group's inputs. Backward, block by
block from the head, over a part of the windows with labels drawn from the model itself: the mean squared gradient g_n²
of every output n. Together they predict what an error e_n of the outputs costs, to second order with the Fisher matrix
of the outputs taken as diagonal:

    KL per token = 1/2 Σ_n E[g_n²] E[e_n²].

(With labels drawn from the model the squared gradient is the Fisher matrix, hence the curvature of the KL itself, which
plain gradients at the text's own labels are not.) The memory beyond the model is one block in float32, its moments, and
the hidden states of the windows. Every block's result is on disk before the next begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parco.fitting import size
from parco.fitting.observe import Energies, Moments, is_lookup, observed, site
from parco.fitting.stages import Progress, Stage, seeded
from parco.fitting.statistics import Statistics
from parco.fitting.stream import Stream, windows_in_batches
from parco.fitting.texts import Windows
from parco.nn.blocks import Group, groups, matrix

BATCH_TOKENS = 2048
LOGIT_ELEMENTS = 1 << 24
APART = 0.05
"""KL per token above which a model run block by block in float32 is not the one that was given; rounding to bf16 costs
about 1e-3."""


@dataclass(frozen=True)
class Extent:
    """How many windows are looked at: `statistics` for Gram matrices, `energy` for gradients, `check` for comparing
    plans, `held` at most for the final judgement.
    """

    statistics: int
    energy: int
    check: int
    held: int = 1 << 20

    @staticmethod
    def for_model(parameters: int) -> Extent:
        """32 windows for small models; fewer for large ones, where a window costs seconds per block."""
        return Extent(32, 16, 16) if parameters <= size.LARGE else Extent(12, 4, 6, 8)


@dataclass(frozen=True)
class Lookups:
    """How often each row of an embedding is read, and how much each of its columns matters.

    frequency: [V], sums to 1. energy: [H], mean squared gradient of the loss with respect to a looked-up row.
    """

    frequency: Tensor
    energy: Tensor


def calibrate(model: nn.Module, windows: Windows, extent: Extent, seed: int, stage: Stage, progress: Progress) -> None:
    """Fill `stage` with moments, energies and the original's log-probabilities on the check windows; resumes inside."""
    stream = Stream(model)
    done = int(stage.read_note("hidden")) if stage.has("hidden") else 0
    if stage.has("grad"):
        done += len(stream.names) - int(stage.read_note("grad")) + 1
    progress.stage("calibrate", 2 * len(stream.names) + 2, done)
    with torch.no_grad():
        _forward(stream, windows, extent, stage, progress)
    _backward(stream, windows, extent, seed, stage, progress)
    stage.finish()
    for bulky in ("inputs-*.safetensors", "hidden.safetensors", "grad.safetensors"):
        stage.drop(bulky)


def block_groups(model: nn.Module, index: int | None) -> list[Group]:
    """The groups of one block; with None those outside the blocks."""
    return [group for group in groups(model) if group.block == index]


def rows_of(length: int, width: int = 1) -> int:
    """Windows per batch: about BATCH_TOKENS tokens, and no more than LOGIT_ELEMENTS outputs of `width` each."""
    return max(1, min(BATCH_TOKENS // length, LOGIT_ELEMENTS // (length * width)))


def _forward(stream: Stream, windows: Windows, extent: Extent, stage: Stage, progress: Progress) -> None:
    tokens = torch.cat([windows.calibration[: extent.statistics], windows.check[: extent.check]])
    counted = min(extent.statistics, windows.calibration.shape[0])
    energy = min(extent.energy, counted)
    rows = rows_of(windows.length)
    start = 0
    if stage.has("hidden"):
        start = int(stage.read_note("hidden"))
        hidden = stage.read_tensors("hidden")["hidden"]
    else:
        with stream.outer():
            hidden = torch.cat([stream.enter(tokens[part]) for part in windows_in_batches(tokens, rows)])
    for index in range(start, len(stream.names)):
        moments = Moments()
        chosen = block_groups(stream.model, index)
        sites = {site(group, member) for group in chosen for member in group.members}

        def see(member: str, seen: Tensor, _: Tensor, moments: Moments = moments, sites: set[str] = sites) -> None:
            if member in sites:
                moments.add(member, seen)

        stage.write_tensors(f"inputs-{index:03}", {"hidden": hidden[:energy]})
        with stream.block(index) as run:
            with observed(stream.model, chosen, see):
                for part in windows_in_batches(hidden[:counted], rows):
                    hidden[part] = run(hidden[part])
            for part in windows_in_batches(hidden[counted:], rows):
                hidden[counted:][part] = run(hidden[counted:][part])
        write_moments(stage, f"block-{index:03}", moments)
        stage.write_tensors("hidden", {"hidden": hidden}, note=index + 1)
        progress.advance()
    if not stage.has("outer"):
        _head(stream, hidden, counted, energy, tokens, stage)
    progress.advance()


def _head(stream: Stream, hidden: Tensor, counted: int, energy: int, tokens: Tensor, stage: Stage) -> None:
    """Moments of the head's inputs, log-probabilities of the check windows, and how often each token occurs."""
    moments = Moments()
    chosen = block_groups(stream.model, None)
    rows = rows_of(hidden.shape[1], vocabulary_of(stream.model))
    stage.write_tensors("inputs-head", {"hidden": hidden[:energy]})
    with stream.outer():
        with observed(stream.model, chosen, lambda member, seen, _: moments.add(member, seen)):
            for part in windows_in_batches(hidden[:counted], rows):
                stream.leave(hidden[part])
        for index in range(counted, hidden.shape[0]):
            logits = stream.leave(hidden[index : index + 1])
            stage.write_tensors(f"check-{index - counted:03}", {"log_probabilities": half_log_softmax(logits[0])})
        gain = _embedding_gain(stream, tokens[:1], chosen)
    _refuse_strangers(stream.model, tokens[-1:], stage.read_tensors(f"check-{len(tokens) - counted - 1:03}"))
    stage.write("gain", gain)
    write_moments(stage, "outer", moments)


def _refuse_strangers(model: nn.Module, tokens: Tensor, apart: dict[str, Tensor]) -> None:
    """Raises ValueError unless the whole model says of tokens [1, T] what it said block by block (the target of a check
    window).

    Some architectures hand their blocks more than hidden states, masks and positions (embeddings of the tokens at every
    block, states of earlier blocks), which `Stream` records once for all windows.
    """
    whole = torch.log_softmax(model(input_ids=tokens, use_cache=False).logits[0].float(), -1)
    pieces = torch.log_softmax(apart["log_probabilities"].float(), -1)
    kl = float(nn.functional.kl_div(pieces, whole, reduction="sum", log_target=True)) / tokens.numel()
    if not kl < APART:
        raise ValueError(
            f"{type(model).__name__} cannot be fitted: run block by block it is another model (KL {kl:.3g} nats per "
            "token), because its blocks are handed more than hidden states; parco.convert_ takes any model"
        )


def _embedding_gain(stream: Stream, tokens: Tensor, chosen: list[Group]) -> float:
    """Squared scale between rows of the embedding's matrix and the first block's input (Gemma multiplies by √H)."""
    lookups = [member for group in chosen for member in group.members if is_lookup(stream.model, member)]
    if not lookups:
        return 1.0
    rows = float(matrix(stream.model, lookups[0])[tokens].float().square().mean())
    return float(stream.enter(tokens).square().mean()) / max(rows, 1e-30)


def vocabulary_of(model: nn.Module) -> int:
    return int(model.config.get_text_config().vocab_size)  # pyright: ignore


def half_log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities as float16. Normalised again after reading, they are a distribution within about 1e-6 nats of
    KL.
    """
    return torch.log_softmax(logits.float(), -1).half()


def write_moments(stage: Stage, name: str, moments: Moments) -> None:
    tensors = {f"gram/{key}": value.float() for key, value in moments.gram.items()}
    tensors |= {f"magnitude/{key}": value.float() for key, value in moments.magnitude.items()}
    tensors |= {f"peak/{key}": value for key, value in moments.peak.items()}
    stage.write_tensors(name, tensors, note=moments.count)


def _backward(stream: Stream, windows: Windows, extent: Extent, seed: int, stage: Stage, progress: Progress) -> None:
    """Energies from the head down. `grad` on disk is the gradient with respect to the hidden states above `note`."""
    count = min(extent.energy, extent.statistics, windows.calibration.shape[0])
    total = count * windows.length
    last = len(stream.names)
    if stage.has("grad"):
        last = int(stage.read_note("grad"))
        grad = stage.read_tensors("grad")["grad"]
    else:
        grad = _backward_head(stream, seed, total, stage)
        progress.advance()
    rows = rows_of(windows.length)
    for index in range(last - 1, -1, -1):
        hidden = stage.read_tensors(f"inputs-{index:03}")["hidden"]
        energies = Energies()
        with stream.block(index) as run, observed(stream.model, block_groups(stream.model, index), energies.see):
            for part in windows_in_batches(hidden, rows):
                state = hidden[part].requires_grad_(True)
                out = run(state)
                (grad[part],) = torch.autograd.grad(out, state, grad[part])
        stage.write_tensors(f"energy-{index:03}", energies.mean(total))
        stage.write_tensors("grad", {"grad": grad}, note=index)
        progress.advance()
    if not stage.has("lookups"):
        shown = windows.calibration.reshape(-1)
        vocabulary = vocabulary_of(stream.model)
        frequency = torch.bincount(shown, minlength=vocabulary).float() + 0.1
        energy = grad.square().mean((0, 1)) * float(stage.read("gain"))
        stage.write_tensors("lookups", {"frequency": frequency / frequency.sum(), "energy": energy})


def _backward_head(stream: Stream, seed: int, total: int, stage: Stage) -> Tensor:
    """Gradient of −log p(y) with y drawn from p, with respect to the last block's output, for every window."""
    hidden = stage.read_tensors("inputs-head")["hidden"]
    grad = torch.empty_like(hidden)
    energies = Energies()
    generator = seeded(seed, "labels")
    with stream.outer(), observed(stream.model, block_groups(stream.model, None), energies.see):
        for index in range(hidden.shape[0]):
            state = hidden[index : index + 1].requires_grad_(True)
            logits = stream.leave(state)
            drawn = torch.multinomial(torch.softmax(logits.detach()[0], -1), 1, generator=generator)[:, 0]
            loss = nn.functional.cross_entropy(logits[0], drawn, reduction="sum")
            (grad[index : index + 1],) = torch.autograd.grad(loss, state)
    stage.write_tensors("energy-outer", energies.mean(total))
    stage.write_tensors("grad", {"grad": grad}, note=len(stream.names))
    return grad


def statistics_of(stage: Stage, group: Group) -> dict[str, Statistics]:
    """Statistics of every member of a group that multiplies (lookups have none), from a calibrated stage."""
    name = "outer" if group.block is None else f"block-{group.block:03}"
    counts: dict[str, int] = stage.read_note(name)
    moments = stage.read_tensors(name)
    shared: dict[str, Statistics] = {}
    found: dict[str, Statistics] = {}
    for member in group.members:
        key = site(group, member)
        if f"gram/{key}" not in moments:
            continue
        if key not in shared:
            sizes = {name: moments[f"{name}/{key}"] for name in ("magnitude", "peak")}
            shared[key] = Statistics(moments[f"gram/{key}"], counts[key], **sizes)
        found[member] = shared[key]
    return with_energies(stage, group, found)


def with_energies(stage: Stage, group: Group, found: Mapping[str, Statistics]) -> dict[str, Statistics]:
    """The statistics of a group's members, each with what calibration has seen of the gradients of its outputs."""
    energies = stage.read_tensors(f"energy-{'outer' if group.block is None else f'{group.block:03}'}")
    return {
        member: statistics.with_energy(energies.get(member), energies.get(f"fisher/{member}"))
        for member, statistics in found.items()
    }


def lookups_of(stage: Stage) -> Lookups:
    tensors = stage.read_tensors("lookups")
    return Lookups(tensors["frequency"], tensors["energy"])
