"""What claims about compressed models have in common: small models, their texts, their statistics and their losses.

The models are the one that ships with parco, a Llama of 10 M parameters, and a GPT-2 of 3 M that is trained here for an
hour on the same text (the Python installation's own sources) and kept under --work. Both are calibrated on a part of
that text and judged on sources that neither has seen: the held-out part of the standard library, and PyTorch's
functional.py, which others wrote in another style.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accumulated import texts as sources
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from parco import hub
from parco.fitting import calibrate, evaluate, heal, solve, texts
from parco.fitting.calibrate import Extent, block_groups, statistics_of
from parco.fitting.methods import Made, Method
from parco.fitting.observe import Moments, observed
from parco.fitting.plan import Fixed, Option
from parco.fitting.stages import Silent, Stage, Stages
from parco.fitting.statistics import Statistics
from parco.fitting.stream import Stream, windows_in_batches
from parco.nn import StoredWeight, share_
from parco.nn.blocks import Group, groups, matrix, replace_
from parco.trainer import Settings
from parco.trainer import run as train
from parco.weights import Dense, shared_tensors

EXTENT = Extent(statistics=32, energy=16, check=8)
HELD = 16
"""Windows of each text on which a model is judged."""
HEAL = heal.STEPS
STEPS = 3000
ROWS = 4
"""Windows at once."""
GPT2 = {"n_embd": 192, "n_layer": 4, "n_head": 3, "n_positions": 512}


@dataclass
class Judged:
    """A model with its windows and what calibration saw of it. `load` gives a fresh copy in float32."""

    name: str
    load: Callable[[], Any]
    windows: texts.Windows
    other: torch.Tensor
    stage: Stage
    stages: Stages

    def healed(self, model: Any) -> Any:
        """`model` after HEAL steps of a fit's healing, which trains its factors, norms, embedding and head."""
        taught = self.stages.open("teacher", calibrated=self.stage.folder.name, steps=HEAL)
        original = self.load()
        teacher = heal.teach(original, self.windows, HEAL, 0, taught, Silent())
        check = self.windows.check[: EXTENT.check]
        with TemporaryDirectory() as folder:
            stage = Stage("heal", Path(folder))
            heal.heal(model, original, teacher, check, self.stage, HEAL, 0, stage, Silent())
        return model

    @property
    def linear_groups(self) -> list[Group]:
        """The groups inside the blocks: what is compressed here."""
        return [group for group in groups(self.load()) if group.block is not None]

    def statistics(self, group: Group) -> dict[str, Statistics]:
        return statistics_of(self.stage, group)

    @property
    def texts(self) -> dict[str, torch.Tensor]:
        """The windows of the held-out text and of the other."""
        return {"held_out": self.windows.held[:HELD], "other_text": self.other[:HELD]}

    def perplexities(self, model: Any) -> dict[str, float]:
        return {name: math.exp(evaluate.quality(model, windows, Silent()).loss) for name, windows in self.texts.items()}

    def divergences(self, model: Any) -> dict[str, float]:
        """KL from the original in nats per token."""
        original = self.load()
        return {
            f"kl_{name}": evaluate.quality(model, windows, Silent(), original).kl
            for name, windows in self.texts.items()
        }


def models(work: Path) -> Iterator[Judged]:
    """Both, calibrated; what takes minutes is kept in `work`."""
    yield shipped(work)
    yield _judged("gpt2", gpt2(work), work)


def shipped(work: Path) -> Judged:
    """The model that ships with parco."""
    return _judged("llama", hub.embedded_path(), work)


def with_outliers(work: Path) -> Judged:
    """The shipped model with outliers: one in 64 of the channels that its norms put out is 32 times as large."""

    def octaves(channels: int, seed: int) -> torch.Tensor:
        order = torch.randperm(channels, generator=torch.Generator().manual_seed(seed))
        return torch.zeros(channels).index_fill_(0, order[: channels // 64], 5.0)

    return _rescaled("llama with outliers", octaves, work)


def with_uneven_channels(work: Path) -> Judged:
    """The shipped model with the channels that its norms put out uneven, as large models' are: their sizes are spread
    log-normally, by a factor of four for a standard deviation.
    """

    def octaves(channels: int, seed: int) -> torch.Tensor:
        return (2 * torch.randn(channels, generator=torch.Generator().manual_seed(seed))).round().clamp(-5, 5)

    return _rescaled("llama with uneven channels", octaves, work)


def _rescaled(name: str, octaves: Callable[[int, int], torch.Tensor], work: Path) -> Judged:
    """The shipped model with what its norms put out times 2^octaves, of so many channels under a seed, and the columns
    that read it divided by as much: what it computes is the same but for roundings.
    """
    folder = work / f"{name.replace(' ', '-')}-new"
    if not folder.exists():
        loaded = hub.load(hub.embedded_path(), low_memory=False)
        model: Any = loaded.model
        with torch.no_grad():
            for index, layer in enumerate(model.model.layers):
                attention, feed = layer.self_attn, layer.mlp
                readers = {
                    layer.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
                    layer.post_attention_layernorm: (feed.gate_proj, feed.up_proj),
                }
                for norm, linears in readers.items():
                    factors = torch.exp2(octaves(len(norm.weight), index))
                    norm.weight *= factors
                    for linear in linears:
                        linear.weight /= factors
        model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    return _judged(name, folder, work)


def _judged(name: str, folder: Path, work: Path) -> Judged:
    loaded = hub.load(folder)
    shipped = hub.embedded_texts()
    found = texts.two_texts(loaded.tokenizer, shipped.calibration, shipped.heldout, "shipped", 512)
    other = texts.tokenize(loaded.tokenizer, inspect.getsource(torch.nn.functional), 512)
    stages = Stages(work / name, Silent())
    stage = stages.open("calibrate", model=loaded.fingerprint, digest=found.digest, extent=vars(EXTENT))
    if not stage.whole:
        calibrate.calibrate(loaded.model.float(), found, EXTENT, 0, stage, Silent())
    return Judged(name, lambda: hub.load(folder).model.float(), found, other, stage, stages)


class Rows:
    """Rows of a claim's result, each kept on disk when it is found: the same command goes on where it was stopped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, object]] = json.loads(path.read_text()) if path.exists() else []

    def add(
        self,
        judged: Judged,
        make: Callable[[], Any],
        judge: Callable[[Judged, Any], dict[str, float]] = Judged.perplexities,
        **key: object,
    ) -> None:
        """What `judge` says of the model that `make` gives, as the row of `key`."""
        wanted = {"model": judged.name, **key}
        if not any(wanted.items() <= row.items() for row in self.rows):
            self.rows.append({**wanted, **judge(judged, make())})
            self.path.write_text(json.dumps(self.rows, indent=1))
            print(self.rows[-1], flush=True)


def gpt2(work: Path) -> Path:
    """A GPT-2 with the shipped tokenizer, trained on the installation's sources without those that are held out."""
    start = work / "gpt2-new"
    if not start.exists():
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(hub.embedded_path())
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **GPT2, **ends)).save_pretrained(start)
        tokenizer.save_pretrained(start)
    data, held = sources(work)
    out = work / "gpt2-trained"
    settings = Settings(
        model=str(start), data=(str(data),), held=str(held), steps=STEPS, batch=8, seq=512, lr=3e-3, warmup=200,
        eval_every=STEPS // 8, save_every=STEPS // 20, watch_every=0,
    )  # fmt: skip
    train(settings, out, Silent(), resume=out.exists())
    return out / "model"


Change = Callable[[Any, Group, dict[str, Statistics]], dict[str, Made]]
"""What a group's members become, for the model as it is and what was seen of the group's inputs."""


def dense(values: torch.Tensor) -> Made:
    """A matrix as it is."""
    spec = Dense((values.shape[0], values.shape[1]), "fp32")
    return spec, spec.encode(values)


@torch.no_grad()
def at_once(judged: Judged, change: Change) -> Any:
    """A model whose groups are all changed on the inputs of the original, as the published methods do."""
    model = judged.load()
    for group in judged.linear_groups:
        _put(model, change(model, group, judged.statistics(group)))
    return model


def stored(method_of: Callable[[str], Method], seeing: bool = True) -> Change:
    """Every member by the method of its name, which is shown what was seen of its inputs unless it is not `seeing`."""

    def change(model: Any, group: Group, seen: dict[str, Statistics]) -> dict[str, Made]:
        return {
            member: method_of(member)(matrix(model, member).float().contiguous(), seen[member] if seeing else None)
            for member in group.members
        }

    return change


def allocated(options: Mapping[str, list[Option]], nbytes: float) -> dict[str, str]:
    """The option of each that the knapsack of a fit takes for the least loss within so many bytes."""
    plan = solve.solve(options, Fixed(0, 0.0, 0.0), solve.Limits(bytes=nbytes), {"loss": 1.0})
    assert plan is not None
    return dict(plan.choices)


def _put(model: Any, made: Mapping[str, Made]) -> None:
    stored = {member: StoredWeight(spec, tensors) for member, (spec, tensors) in made.items()}
    if any(shared_tensors(spec) for spec, _ in made.values()):
        share_(list(stored.values()))
    for member, weight in stored.items():
        replace_(model, member, weight)


@torch.no_grad()
def in_turn(judged: Judged, change: Change, together: bool = True) -> Any:
    """A model whose groups are changed on shifted inputs, what the groups changed before them produce: block by block
    as a fit and the published methods of pruning do, or, not `together`, group by group. The statistics hold the cross
    moments with the original's inputs.
    """
    model = judged.load()
    stream = Stream(model)
    before = stream.enter(judged.windows.calibration[: EXTENT.statistics])
    after = before.clone()
    for index in range(len(stream.names)):
        chosen = block_groups(model, index)
        original = _inputs(stream, index, before, chosen)
        for now in [chosen] if together else [[group] for group in chosen]:
            found = _shifted(stream, index, after, now, original)
            for group in now:
                _put(model, change(model, group, dict.fromkeys(group.members, found[group.name])))
        with stream.block(index) as run:
            for part in windows_in_batches(after, ROWS):
                after[part] = run(after[part])
    return model


def _inputs(stream: Stream, index: int, hidden: torch.Tensor, chosen: list[Group]) -> list[dict[str, torch.Tensor]]:
    """What the members of some groups of a block see, batch by batch; `hidden` becomes what the block returns."""
    batches: list[dict[str, torch.Tensor]] = []
    with stream.block(index) as run:
        for part in windows_in_batches(hidden, ROWS):
            seen: dict[str, torch.Tensor] = {}
            with observed(stream.model, chosen, lambda member, x, _, seen=seen: seen.__setitem__(member, x)):
                hidden[part] = run(hidden[part])
            batches.append(seen)
    return batches


def _shifted(
    stream: Stream, index: int, hidden: torch.Tensor, now: list[Group], original: list[dict[str, torch.Tensor]]
) -> dict[str, Statistics]:
    """Statistics of some groups of a block by the groups' names; of `original` are the inputs in the original model."""
    moments = Moments()
    for seen, before in zip(_inputs(stream, index, hidden.clone(), now), original, strict=True):
        for group in now:
            moments.add(group.name, seen[group.members[0]], before[group.members[0]])
    return {
        name: Statistics(
            gram.float(),
            moments.count[name],
            moments.cross[name].float(),
            magnitude=moments.magnitude[name].float(),
            peak=moments.peak[name],
        )
        for name, gram in moments.gram.items()
    }
