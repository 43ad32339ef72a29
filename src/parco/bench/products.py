"""Products timed as a user runs them: every storage beside other libraries' own, interleaved in one run.

Before every timed product other bytes pass through the caches, as the rest of a model does between two uses of a
layer, and then x, which its user has just written. Times are medians with quartiles; ratios and shares of the machine's
peak hold inside one run only.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from parco import machine
from parco.bench.peers import BASELINE, Contender, check, installed, of
from parco.bench.record import Record, quartiles, record
from parco.formats import Format, ScaleDelayed, parse
from parco.kernels.table import element_of, explain
from parco.products import Activations, Native
from parco.weights import Dense, Quantized, Weight

FORMATS = ("int8:row", "int4:32", "nf4:64", "ternary", "fp8_e4m3:row", "mxfp8_e4m3", "mxfp4", "nvfp4")
ROWS = (1, 8, 64, 512)
ROUNDS = 7
MOST_BETWEEN = 512 << 20
"""Bytes that pass between two uses of a weight, at most; twice the last cache where that is less."""

Shape = tuple[int, int]


class Row(TypedDict):
    """One contender on one shape and number of rows of x. `of_peak` is the larger of the bytes it reads per second over
    those that the machine does, and of its multiply-adds over the machine's on `element`.
    """

    shape: Shape
    layers: int
    rows: int
    contender: str
    kernel: str
    element: str
    median_us: float
    quartile1_us: float
    quartile3_us: float
    bytes: int
    GB_per_s: float
    G_multiply_adds_per_s: float
    of_peak: float
    times_bf16: float


class Missing(TypedDict):
    """A peer that could not run on a shape."""

    shape: Shape
    contender: str
    reason: str


class Report(Record):
    """`missing` are peers that could not run on a shape, each with the reason."""

    bytes_between: int
    rows: list[Row]
    missing: list[Missing]


def contenders(
    shape: Shape, rows: int, formats: Sequence[str | Format], peers: Sequence[str] = ("torch",)
) -> list[Contender]:
    """The products of `peers` and parco's for bf16 x of `rows` rows, also with x rounded to int8 of formats that take
    it.
    """
    int8 = Activations()
    found = of(peers)
    for format in formats:
        form = parse(format)
        spec: Weight = Dense(shape, str(form)) if form.is_dense else Quantized(form, shape)
        for product in (Native(), int8) if spec.takes(int8) else (Native(),):
            (explained,) = explain(spec, rows=rows, dtype=torch.bfloat16, product=product)
            found.append(
                Contender(
                    f"parco {form}{'' if product == Native() else f' {product}'}",
                    element_of(explained),
                    lambda matrix, spec=spec: spec.pack(*spec.encode(matrix)),
                    functools.partial(spec.apply, product=product),
                    explained.kernel,
                )
            )
    return found


def run(
    shapes: Mapping[Shape, int],
    *,
    formats: Sequence[str | Format] = FORMATS,
    rows: Sequence[int] = ROWS,
    peers: Sequence[str] | None = None,
    rounds: int = ROUNDS,
    between: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Report:
    """Time every contender on every shape (N, K) and number of rows; `shapes` says how many layers have each.

    `between` is how many bytes pass through the caches before every product: those of the rest of the model, or, by
    default, twice the last cache. `peers` are libraries to compare with, by default all of `PEERS` that are installed;
    PyTorch is always among them. `advance` is called after each of len(shapes) · len(rows) measurements. Raises
    ValueError for unknown formats and peers, for delayed formats, whose scale comes from a training, and for sizes
    below 1.
    """
    formats = [parse(format) for format in formats]
    peers = ["torch", *(name for name in (installed() if peers is None else peers) if name != "torch")]
    check(peers)
    for form in formats:
        if isinstance(form.scale, ScaleDelayed):
            raise ValueError(f"formats: {str(form)!r} has the scale of an earlier step, and here is none")
    sizes = [size for shape in shapes for size in shape]
    for name, numbers in (("shapes", sizes), ("rows", rows), ("rounds", [rounds])):
        if not numbers or min(numbers) < 1:
            raise ValueError(f"{name}={list(numbers)}: at least one is needed, and each at least 1")
    limit = min(2 * machine.detect().l3 or MOST_BETWEEN, MOST_BETWEEN, machine.detect().memory // 8)
    passing = torch.ones(max(1, min(limit, limit if between is None else between) // 4))
    before = machine.peaks(refresh=True)
    found: list[Row] = []
    missing: list[Missing] = []
    for shape, layers in shapes.items():
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / shape[1] ** 0.5
        for height in rows:
            found += _time(
                shape, layers, height, weight, contenders(shape, height, formats, peers), rounds, passing, missing
            )
            advance()
    peaks = machine.best(before, machine.peaks(refresh=True))
    for row in found:
        multiplied = row["G_multiply_adds_per_s"] * 1e9 / peaks.multiply_adds(row["element"])
        row["of_peak"] = max(row["GB_per_s"] * 1e9 / peaks.read_bytes_per_second, multiplied)
    return {
        **record(peaks, peers),
        "bytes_between": passing.nbytes,
        "rows": found,
        "missing": missing,
    }


def _time(
    shape: Shape,
    layers: int,
    height: int,
    weight: Tensor,
    entrants: Sequence[Contender],
    rounds: int,
    passing: Tensor,
    missing: list[Missing],
) -> list[Row]:
    x = torch.randn(height, shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    held: dict[str, tuple[Any, ...]] = {}
    with torch.inference_mode():
        for entrant in entrants:
            try:
                stored = entrant.make(weight)
                entrant.run(x, *stored)
            except Exception as error:  # whatever a peer raises is its reason
                if entrant.kernel:
                    raise
                reason = " ".join(str(error).split()) or type(error).__name__
                if all((shape, entrant.name) != (one["shape"], one["contender"]) for one in missing):
                    missing.append({"shape": shape, "contender": entrant.name, "reason": reason})
                continue
            held[entrant.name] = stored
        seconds: dict[str, list[float]] = {name: [] for name in held}
        for turn in range(rounds + 1):
            for entrant in entrants:
                if entrant.name not in held:
                    continue
                stored = held[entrant.name]
                passing.sum()
                x.sum()
                began = time.perf_counter()
                entrant.run(x, *stored)
                if turn:
                    seconds[entrant.name].append(time.perf_counter() - began)
    sizes = {entrant.name: entrant.size(*held[entrant.name]) for entrant in entrants if entrant.name in held}
    work = height * shape[0] * shape[1]
    found: list[Row] = []
    for entrant in entrants:
        if entrant.name not in held:
            continue
        mine = seconds[entrant.name]
        low, middle, high = quartiles(mine)
        found.append(
            {
                "shape": shape,
                "layers": layers,
                "rows": height,
                "contender": entrant.name,
                "kernel": entrant.kernel,
                "element": entrant.element,
                "median_us": middle * 1e6,
                "quartile1_us": low * 1e6,
                "quartile3_us": high * 1e6,
                "bytes": sizes[entrant.name],
                "GB_per_s": sizes[entrant.name] / middle / 1e9,
                "G_multiply_adds_per_s": work / middle / 1e9,
                "of_peak": 0.0,
                "times_bf16": statistics.median(
                    theirs / ours for theirs, ours in zip(seconds[BASELINE], mine, strict=True)
                ),
            }
        )
    return found
