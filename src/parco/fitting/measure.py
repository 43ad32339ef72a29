"""Seconds of every candidate on this machine, and of whole models, each measured once and kept.

A kernel is timed as a model uses it: one activation row (decode) or a prompt of them (prefill), and weights that are
not in a core's cache because the rest of the model has passed through it since (copies are rotated until they exceed
the caches, or the whole model where that is smaller). All kinds of one shape are timed in interleaved rounds and the
lower quartile counts, so that a neighbour's burst of work does not decide between them. What remains of a measured step
of the original when its matrices' kernels are taken away is the remainder, which no choice changes.

Results live in the user's cache folder, keyed by `machine.conditions()` (CPU, instruction set, threads, parco's version
and compiled extension): a command that is repeated decides by the same numbers.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parco import machine
from parco.fitting.stages import Progress, digest, write_json
from parco.nn import packed
from parco.weights import Sparse, Weight

FOOTPRINT_LIMIT = 512 << 20
DECODE_ROUNDS = 9
PREFILL_ROUNDS = 5
COPIES_LIMIT = 64


class Timings:
    """Measured seconds by key, on disk after every addition."""

    def __init__(self, version: str, folder: Path | None = None) -> None:
        self.key = machine.conditions() | {"version": version}
        self.path = (folder or machine.cache_folder()) / f"timings-{digest(self.key)}.json"
        self._seconds = self._on_disk()

    def __contains__(self, key: str) -> bool:
        return key in self._seconds

    def __getitem__(self, key: str) -> float:
        return self._seconds[key]

    def add(self, found: Mapping[str, float]) -> None:
        """Keep new measurements; what another process has added meanwhile is kept too, and ours is the newer."""
        self._seconds = self._on_disk() | self._seconds
        self._seconds |= {key: float(value) for key, value in found.items()}
        write_json(self.path, {"key": self.key, "seconds": self._seconds})

    def _on_disk(self) -> dict[str, float]:
        """What the file holds; nothing where there is none, or a damaged one, which the next addition replaces."""
        try:
            return dict(json.loads(self.path.read_text())["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}


def kernel_key(kind: str, rows: int, dtype: torch.dtype, footprint: int) -> str:
    """`kind` is a Weight's text, or "native(NxK)" for the product that Transformers runs on the original."""
    return f"{kind} | {rows} rows | {str(dtype).removeprefix('torch.')} | {footprint_class(footprint)} MiB"


def footprint_class(footprint: int) -> int:
    """The footprint in MiB, rounded up to a power of two and bounded, so that models of like size share timings."""
    size = 1
    while size < min(footprint, FOOTPRINT_LIMIT) >> 20:
        size *= 2
    return size


def native(shape: tuple[int, int]) -> str:
    return f"native({shape[0]}x{shape[1]})"


def measure_kernels(
    specs: Mapping[tuple[int, int], Sequence[Weight]],
    rows: Sequence[int],
    dtype: torch.dtype,
    footprint: int,
    timings: Timings,
    progress: Progress,
) -> None:
    """Time every spec of every shape, and the native product of that shape, at every number of rows; known ones are
    skipped.
    """
    missing: dict[tuple[tuple[int, int], int], dict[str, Weight | None]] = {}
    for shape, kinds in specs.items():
        keys = {native(shape): None, **{str(spec): spec for spec in kinds}}
        for height in rows:
            missing[shape, height] = {
                key: spec for key, spec in keys.items() if kernel_key(key, height, dtype, footprint) not in timings
            }
    left = {place: unknown for place, unknown in missing.items() if unknown}
    progress.stage("measure", len(missing), len(missing) - len(left))
    for (shape, height), unknown in left.items():
        with torch.inference_mode():
            found = _time_shape(shape, unknown, height, dtype, footprint)
        timings.add({kernel_key(key, height, dtype, footprint): value for key, value in found.items()})
        progress.advance()


def _time_shape(
    shape: tuple[int, int], kinds: Mapping[str, Weight | None], rows: int, dtype: torch.dtype, footprint: int
) -> dict[str, float]:
    """Seconds of one product of each kind, rounds interleaved."""
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    share = min(footprint, FOOTPRINT_LIMIT) // len(kinds)
    runs: dict[str, Callable[[], object]] = {}
    calls: dict[str, int] = {}
    for key, spec in kinds.items():
        run, copies = _runner(shape, spec, x, share if rows == 1 else 0)
        run()
        once = _seconds(run, 1)
        # One pass over the copies at most: by the time of the next round the other kinds have displaced them.
        calls[key] = max(1, min(copies, int(2e-3 / max(once, 1e-7))))
        runs[key] = run
    seen: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(DECODE_ROUNDS if rows == 1 else PREFILL_ROUNDS):
        for key, run in runs.items():
            seen[key].append(_seconds(run, calls[key]))
    return {key: lower_quartile(values) for key, values in seen.items()}


def lower_quartile(values: Sequence[float]) -> float:
    """The value below which a quarter of the measurements lie. Other work on the machine only ever adds time."""
    return sorted(values)[len(values) // 4]


def _seconds(run: Callable[[], object], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - began) / calls


def _runner(shape: tuple[int, int], spec: Weight | None, x: Tensor, share: int) -> tuple[Callable[[], object], int]:
    """A function that multiplies x by the next of several copies of the weight, about `share` bytes of them; their
    number.
    """
    if spec is None:
        tensors = [torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(x.dtype) * 0.02]
    else:
        tensors = spec.pack(*plausible_tensors(spec))
    size = sum(tensor.nbytes for tensor in tensors)
    copies = [tensors] + [
        [tensor.clone() for tensor in tensors] for _ in range(min(share // max(size, 1), COPIES_LIMIT) - 1)
    ]
    turn = count()

    def run() -> object:
        chosen = copies[next(turn) % len(copies)]
        return nn.functional.linear(x, chosen[0]) if spec is None else spec.apply(x, *chosen)

    return run, len(copies)


def plausible_tensors(spec: Weight) -> list[Tensor]:
    """Tensors of the spec's shapes and types with finite, ordinary values: no kernel's time depends on others."""
    generator = torch.Generator().manual_seed(2)
    parts = spec.parts()
    if parts:
        return [tensor for part in parts.values() for tensor in plausible_tensors(part)]
    if isinstance(spec, Sparse):  # what says where numbers stand is no ordinary value
        matrix = torch.rand(spec.shape, generator=generator) * 0.02 + 0.01
        return list(spec.encode(matrix * spec.keep(matrix)))
    made: list[Tensor] = []
    for name, wanted in spec.tensors().items():
        if wanted.dtype == torch.uint8:
            fixed = {"scale": 120, "zero": 7}.get(name)
            made.append(
                torch.randint(0, 120, wanted.shape, dtype=torch.uint8, generator=generator)
                if fixed is None
                else torch.full(wanted.shape, fixed, dtype=torch.uint8)
            )
        else:
            made.append((torch.rand(wanted.shape, generator=generator) * 0.02 + 0.01).to(wanted.dtype))
    return made


PROMPT = 32
STEPS = 24


def decode_seconds(model: nn.Module, steps: int = STEPS) -> float:
    """Seconds (lower quartile) of one greedy decoding step through Transformers, batch 1, after a prompt of PROMPT
    tokens.
    """
    times: list[float] = []
    with torch.inference_mode():
        out: Any = model(input_ids=_prompt(model, PROMPT), use_cache=True)
        for _ in range(steps):
            token = out.logits[:, -1:].argmax(-1)
            began = time.perf_counter()
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            times.append(time.perf_counter() - began)
    return lower_quartile(times)


def prefill_seconds(model: nn.Module, tokens: int) -> float:
    """Seconds of one prompt of `tokens` tokens through Transformers, with a cache and the last position's logits, as
    generate does.
    """
    ids = _prompt(model, tokens)
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.inference_mode():
        began = time.perf_counter()
        model(input_ids=ids, use_cache=True, **last)
        return time.perf_counter() - began


def _prompt(model: Any, tokens: int) -> Tensor:
    vocabulary = int(model.config.get_text_config().vocab_size)
    return torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(3))


def interleaved(models: Mapping[str, nn.Module], prefill_tokens: int, rounds: int) -> dict[str, tuple[float, float]]:
    """(decode seconds per token, prefill seconds per prompt) of each model over rounds in which they take turns, their
    stored weights packed as loaded models have them.
    """
    decode: dict[str, list[float]] = {name: [] for name in models}
    prefill: dict[str, list[float]] = {name: [] for name in models}
    with packed(*models.values()):
        for model in models.values():
            decode_seconds(model, 4)
            prefill_seconds(model, prefill_tokens)
        for turn in range(rounds):
            order = list(models.items()) if turn % 2 == 0 else list(models.items())[::-1]
            for name, model in order:
                decode[name].append(decode_seconds(model))
                prefill[name].append(prefill_seconds(model, prefill_tokens))
    return {name: (lower_quartile(decode[name]), lower_quartile(prefill[name])) for name in models}
