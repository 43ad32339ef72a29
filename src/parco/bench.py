"""Products timed as a user runs them: every storage beside PyTorch's own, interleaved in one run.

Weights are cold: each contender rotates through copies, and by the time it meets one again all the others have passed
through the caches. Times are medians with quartiles; ratios and shares of the machine's peak hold inside one run only.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn.functional import linear

from parco import machine
from parco.formats import Format, parse
from parco.kernels.table import explain
from parco.weights import Dense, Quantized, Weight

FORMATS = ("int8:row", "int4:32", "nf4:64", "ternary", "fp8_e4m3:row", "mxfp8_e4m3", "mxfp4", "nvfp4")
ROWS = (1, 8, 64, 512)
ROUNDS = 7
COLD = 1 << 30
"""Bytes that all contenders together rotate through."""

BASELINE = "torch bf16"

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


class Report(TypedDict):
    """`missing` names the peers that could not run, with the reason."""

    machine: dict[str, Any]
    peaks: dict[str, Any]
    threads: int
    versions: dict[str, str]
    commit: str
    cold_bytes: int
    rows: list[Row]
    missing: dict[str, str]


@dataclass(frozen=True)
class Contender:
    """One way to multiply: `make(weight)` stores an fp32 matrix [N, K], and `run(x, *stored)` multiplies by it."""

    name: str
    element: str
    make: Callable[[Tensor], tuple[Tensor, ...]]
    run: Callable[..., Tensor]
    kernel: str = ""


def contenders(shape: Shape, rows: int, formats: Sequence[str | Format]) -> list[Contender]:
    """PyTorch's products and parco's for bf16 x of `rows` rows."""
    found = [
        Contender("torch fp32", "fp32", lambda w: (w.clone(),), lambda x, w: linear(x.float(), w)),
        Contender(BASELINE, "bf16", lambda w: (w.bfloat16(),), linear),
        Contender("torch int8pack", "fp32", _int8pack, torch.ops.aten._weight_int8pack_mm),
        Contender("torch int4pack:32", "fp32", _int4pack, _run_int4pack),
        Contender("torch int_mm", "int8", _int_mm, _run_int_mm),
    ]
    for format in formats:
        form = parse(format)
        spec: Weight = Dense(shape, str(form)) if form.is_dense else Quantized(form, shape)
        (explained,) = explain(spec, rows=rows, dtype=torch.bfloat16)
        element = "int16" if explained.kernel.startswith("int") else "fp32"
        name = f"parco {form}"
        found.append(Contender(name, element, spec.encode, spec.apply, explained.kernel))
    return found


def _int8pack(weight: Tensor) -> tuple[Tensor, ...]:
    if weight.shape[1] % 32:
        # It does not check: the process would end here (seen with 50 inputs, torch 2.13).
        raise RuntimeError("it takes multiples of 32 inputs")
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale[:, 0].bfloat16()


def _int4pack(weight: Tensor) -> tuple[Tensor, ...]:
    """Codes, and for each group of 32 a scale and a zero, as _weight_int4pack_mm_for_cpu wants them."""
    rows, columns = weight.shape
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed, torch.full((columns // 32, rows, 2), 0.01, dtype=torch.bfloat16)


def _run_int4pack(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, scales)


def _int_mm(weight: Tensor) -> tuple[Tensor, ...]:
    return (torch.randint(-127, 128, tuple(weight.shape), dtype=torch.int8),)


def _run_int_mm(x: Tensor, weight: Tensor) -> Tensor:
    """The product alone, without the quantization of x and the scales that a user of it adds."""
    return torch.ops.aten._int_mm(x.view(torch.int8)[:, : weight.shape[1]], weight.T)


def run(
    shapes: Mapping[Shape, int],
    *,
    formats: Sequence[str | Format] = FORMATS,
    rows: Sequence[int] = ROWS,
    rounds: int = ROUNDS,
    cold: int = COLD,
    advance: Callable[[], None] = lambda: None,
) -> Report:
    """Time every contender on every shape (N, K) and number of rows; `shapes` says how many layers have each.

    `advance` is called after each of len(shapes) · len(rows) measurements. Raises ValueError for unknown formats and
    sizes below 1.
    """
    formats = [parse(format) for format in formats]
    for name, numbers in (
        ("shapes", [size for shape in shapes for size in shape]),
        ("rows", rows),
        ("rounds", [rounds]),
    ):
        if not numbers or min(numbers) < 1:
            raise ValueError(f"{name}={list(numbers)}: at least one is needed, and each at least 1")
    before = machine.peaks(refresh=True)
    found: list[Row] = []
    missing: dict[str, str] = {}
    for shape, layers in shapes.items():
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / shape[1] ** 0.5
        for height in rows:
            found += _time(shape, layers, height, weight, contenders(shape, height, formats), rounds, cold, missing)
            advance()
    # The probe too is slowed by other work: the better of before and after counts.
    peaks = _best(before, machine.peaks(refresh=True))
    for row in found:
        multiplied = row["G_multiply_adds_per_s"] * 1e9 / _multiply_adds(peaks, row["element"])
        row["of_peak"] = max(row["GB_per_s"] * 1e9 / peaks.read_bytes_per_second, multiplied)
    here = machine.detect()
    return {
        "machine": {"cpu": here.cpu, "cores": here.cores, "isa": machine.isa(), "features": list(here.features)},
        "peaks": {"read_bytes_per_second": peaks.read_bytes_per_second, **peaks.multiply_adds_per_second},
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": _commit(),
        "cold_bytes": cold,
        "rows": found,
        "missing": missing,
    }


def _best(before: machine.Peaks, after: machine.Peaks) -> machine.Peaks:
    rates = {
        element: max(rate, after.multiply_adds_per_second[element])
        for element, rate in before.multiply_adds_per_second.items()
    }
    return machine.Peaks(
        max(before.read_bytes_per_second, after.read_bytes_per_second),
        max(before.copy_bytes_per_second, after.copy_bytes_per_second),
        rates,
    )


def _multiply_adds(peaks: machine.Peaks, element: str) -> float:
    """What the machine does on `element`, or on a wider one where that is faster: then a library would use it."""
    rates = peaks.multiply_adds_per_second
    return max(rates[element], rates["fp32"])


def _time(
    shape: Shape,
    layers: int,
    height: int,
    weight: Tensor,
    entrants: Sequence[Contender],
    rounds: int,
    cold: int,
    missing: dict[str, str],
) -> list[Row]:
    x = torch.randn(height, shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    runs: dict[str, Callable[[], Tensor]] = {}
    sizes: dict[str, int] = {}
    with torch.inference_mode():
        for entrant in entrants:
            try:
                stored = entrant.make(weight)
                entrant.run(x, *stored)
            except (RuntimeError, AttributeError) as error:
                missing[entrant.name] = str(error).splitlines()[0]
                continue
            sizes[entrant.name] = sum(tensor.nbytes for tensor in stored)
            runs[entrant.name] = _rotating(x, entrant, stored, cold // len(entrants) // sizes[entrant.name])
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(rounds + 1):
            for name, call in runs.items():
                began = time.perf_counter()
                call()
                if turn:
                    seconds[name].append(time.perf_counter() - began)
    work = height * shape[0] * shape[1]
    found: list[Row] = []
    for entrant in entrants:
        if entrant.name not in runs:
            continue
        mine = seconds[entrant.name]
        low, middle, high = statistics.quantiles(mine, n=4) if len(mine) > 1 else (mine[0],) * 3
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


def _rotating(x: Tensor, entrant: Contender, stored: tuple[Tensor, ...], copies: int) -> Callable[[], Tensor]:
    held = [stored, *(tuple(tensor.clone() for tensor in stored) for _ in range(min(copies, 64) - 1))]
    turn = count()
    return lambda: entrant.run(x, *held[next(turn) % len(held)])


def _commit() -> str:
    """The commit of the clone that this file lies in; empty elsewhere."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
