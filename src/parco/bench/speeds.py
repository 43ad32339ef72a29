"""Whole models in turn: tokens per second of a prompt, of steps with a cache, and of Transformers' own `generate`."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol, TypedDict

import torch
from torch import Tensor, nn

from parco import machine
from parco.bench.record import Record, quartiles, record

Kind = Literal["prefill", "decode", "generate"]
KINDS: tuple[Kind, ...] = ("prefill", "decode", "generate")
DECODE_PROMPT = 64


class Runner(Protocol):
    """What answers a prompt and goes on from it, and tells the seconds."""

    def prefill(self, tokens: Sequence[int]) -> float:
        """Of one prompt, with the logits of its last position and a cache for what follows."""
        ...

    def decode(self, prompt: Sequence[int], steps: int) -> list[float]:
        """Of each of `steps` greedy steps after `prompt`."""
        ...


class Transformed:
    """A model of Transformers, called as its `generate` calls it, and through `generate` itself."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        takes = inspect.signature(model.forward).parameters
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def prefill(self, tokens: Sequence[int]) -> float:
        """Seconds of one prompt."""
        return self._prompt(tokens)[0]

    def decode(self, prompt: Sequence[int], steps: int) -> list[float]:
        """Seconds of each of `steps` greedy steps after `prompt`; choosing the token is not counted."""
        found: list[float] = []
        _, out = self._prompt(prompt)
        with torch.inference_mode():
            for _ in range(steps):
                token = out.logits[:, -1:].argmax(-1)
                began = time.perf_counter()
                out = self.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                found.append(time.perf_counter() - began)
        return found

    def generate(self, prompt: Sequence[int], steps: int) -> list[float]:
        """Seconds between the tokens of one greedy `generate`, the first of which ends the prompt; all that it does
        besides the model's forward is counted.
        """
        clock = _Clock()
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=steps + 1,
                max_new_tokens=steps + 1,
                do_sample=False,
                pad_token_id=0,
                streamer=clock,
            )
        times = clock.times[-steps - 1 :]
        return [after - before for before, after in pairwise(times)]

    def _prompt(self, tokens: Sequence[int]) -> tuple[float, Any]:
        ids = torch.tensor([list(tokens)])
        with torch.inference_mode():
            began = time.perf_counter()
            out = self.model(input_ids=ids, use_cache=True, **self._last)
            return time.perf_counter() - began, out


class _Clock:
    """A streamer that notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class Entrant:
    """A model to be timed. `read_bytes`: weights that a decoding step reads. `prompt_products`, `step_products`:
    multiply-adds by weights of one token of a prompt, and of a step. `rival`: the entrant to be compared with
    besides the first.
    """

    name: str
    runner: Runner
    read_bytes: int
    prompt_products: int
    step_products: int
    rival: str = ""


class ModelRow(TypedDict):
    """One entrant at one kind of work. Quartiles of the decode are over single steps. `of_peak` is the larger of the
    bytes of weights read per second over those that the machine reads, and of the multiply-adds by weights over the
    machine's most. `times_first` and `times_rival` compare the same rounds: medians, and the least and the greatest
    of them.
    """

    contender: str
    kind: Kind
    tokens_per_second: float
    quartile1: float
    quartile3: float
    read_bytes: int
    GB_per_s: float
    G_multiply_adds_per_s: float
    of_peak: float
    times_first: float
    rival: str
    times_rival: float | None
    times_rival_range: tuple[float, float] | None


class Absent(TypedDict):
    """A contender that there is none of, and why."""

    contender: str
    reason: str


class ModelsReport(Record):
    """`prompt` tokens were a prefill, `steps` steps after DECODE_PROMPT tokens a decode."""

    model: str
    prompt: int
    steps: int
    rounds: int
    notes: dict[str, str]
    rows: list[ModelRow]
    missing: list[Absent]


def check(prompt: int, steps: int, rounds: int) -> None:
    """Raises ValueError for numbers below 1."""
    for name, number in (("prompt", prompt), ("steps", steps), ("rounds", rounds)):
        if number < 1:
            raise ValueError(f"{name}={number}: it must be at least 1")


def speeds(
    entrants: Sequence[Entrant],
    *,
    model: str,
    vocabulary: int,
    prompt: int = 512,
    steps: int = 64,
    rounds: int = 3,
    libraries: Sequence[str] = (),
    notes: Mapping[str, str] | None = None,
    missing: Sequence[Absent] = (),
    advance: Callable[[], None] = lambda: None,
) -> ModelsReport:
    """Times every entrant in every round, to and fro; one short turn before is not counted. `vocabulary`: token numbers
    below it make the prompts. `advance` is called after each of len(entrants) · (rounds + 1) turns. Raises
    ValueError for numbers below 1.
    """
    check(prompt, steps, rounds)
    tokens = torch.randint(0, vocabulary, (max(prompt, DECODE_PROMPT),), generator=torch.Generator().manual_seed(3))
    numbers: list[int] = tokens.tolist()
    before = machine.peaks(refresh=True)
    for entrant in entrants:
        _turn(entrant.runner, numbers[: min(prompt, 32)], numbers[:8], 2)
        advance()
    seen: dict[str, list[dict[Kind, list[float]]]] = {entrant.name: [] for entrant in entrants}
    for turn in range(rounds):
        for entrant in entrants if turn % 2 == 0 else entrants[::-1]:
            seen[entrant.name].append(
                _turn(entrant.runner, numbers[:prompt], numbers[: min(DECODE_PROMPT, prompt)], steps)
            )
            advance()
    peaks = machine.best(before, machine.peaks(refresh=True))
    return {
        **record(peaks, libraries),
        "model": model,
        "prompt": prompt,
        "steps": steps,
        "rounds": rounds,
        "notes": dict(notes or {}),
        "rows": [
            row
            for kind in KINDS
            for entrant in entrants
            for row in _row(entrants[0], entrant, kind, seen, prompt, peaks)
        ],
        "missing": list(missing),
    }


def _turn(runner: Runner, prompt: Sequence[int], start: Sequence[int], steps: int) -> dict[Kind, list[float]]:
    found: dict[Kind, list[float]] = {"prefill": [runner.prefill(prompt)], "decode": runner.decode(start, steps)}
    if isinstance(runner, Transformed):
        found["generate"] = runner.generate(start, steps)
    return found


def _row(
    first: Entrant,
    entrant: Entrant,
    kind: Kind,
    seen: Mapping[str, Sequence[Mapping[Kind, Sequence[float]]]],
    prompt: int,
    peaks: machine.Peaks,
) -> list[ModelRow]:
    """The row, or none where the entrant does no such work."""
    mine = [turn[kind] for turn in seen[entrant.name] if kind in turn]
    if not mine:
        return []
    count = prompt if kind == "prefill" else 1
    seconds = [second / count for turn in mine for second in turn]
    low, middle, high = quartiles(seconds)
    products = entrant.step_products
    if kind == "prefill":  # the head sees one position of a prompt
        products = entrant.prompt_products + (entrant.step_products - entrant.prompt_products) / prompt
    read, multiplied = entrant.read_bytes / middle / count, products / middle
    # A rival that has no `generate` is compared by its steps alone, to its advantage.
    ratios = [] if not entrant.rival else _ratios(seen[entrant.rival], seen[entrant.name], kind)
    row: ModelRow = {
        "contender": entrant.name,
        "kind": kind,
        "tokens_per_second": 1 / middle,
        "quartile1": 1 / high,
        "quartile3": 1 / low,
        "read_bytes": entrant.read_bytes,
        "GB_per_s": read / 1e9,
        "G_multiply_adds_per_s": multiplied / 1e9,
        "of_peak": max(read / peaks.read_bytes_per_second, multiplied / max(peaks.multiply_adds_per_second.values())),
        "times_first": statistics.median(_ratios(seen[first.name], seen[entrant.name], kind)),
        "rival": entrant.rival,
        "times_rival": statistics.median(ratios) if ratios else None,
        "times_rival_range": (min(ratios), max(ratios)) if ratios else None,
    }
    return [row]


def _ratios(
    theirs: Sequence[Mapping[Kind, Sequence[float]]], ours: Sequence[Mapping[Kind, Sequence[float]]], kind: Kind
) -> list[float]:
    """How many times faster `ours` is, for each round, by the medians of its steps."""
    other: Kind = kind if kind in theirs[0] else "decode"
    return [
        statistics.median(their[other]) / statistics.median(our[kind]) for their, our in zip(theirs, ours, strict=True)
    ]
