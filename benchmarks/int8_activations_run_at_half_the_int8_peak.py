"""Claim: x rounded to int8 inside the call, rounding and packing counted, multiplies int8 rows and int4 groups of 128
at half of what the machine's int8 instructions do at best, or more, from 64 rows on; and 8 cold rows take at most
1.5 times as long as one. Groups of 32 stay below: 0.42 to 0.51, and 1.7.

`of_peak` is the share of the int8 peak that parco.machine measures on operands in L1 (before and after, the better).
Peers run in the same rounds: torch._int_mm on int8 that is there already (no rounding, no scales), torchao's int8
dynamic activations with int8 weights where torchao is installed, torch's bf16 product, and the same stored weights
without rounding x. With few rows weights are cold, torchao's apart: each call takes the next of enough copies to fill
`--cold` MB.

    python benchmarks/int8_activations_run_at_half_the_int8_peak.py [--threads N] [--rounds R] [--cold MB] [--rows M,..]
"""

import argparse
from collections.abc import Callable
from itertools import count
from typing import cast

import torch
from interleaved import interleave, ratio, save, spread, stored_copies

from parco import machine
from parco.products import Activations, Native
from parco.weights import Quantized

SHAPES = [(1, 4096, 4096), (8, 4096, 4096), (16, 4096, 4096), (64, 4096, 4096), (512, 4096, 4096), (512, 11008, 4096)]
SHAPES += [(2048, 2048, 2048)]
FORMATS = ["int8:row", "int4:128", "int4:32"]
COLD_ROWS = 16


def torchao(weight: torch.Tensor) -> torch.nn.Module | None:
    """torchao's linear layer of int8 dynamic activations and int8 weights."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        return None
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    return layer


def contenders(rows: int, outputs: int, columns: int, cold: int) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    copies = cold // (outputs * columns) + 1 if rows <= COLD_ROWS else 1
    x = torch.randn(rows, columns, generator=generator).bfloat16()
    matrix = torch.randn(outputs, columns, generator=generator).bfloat16() / columns**0.5
    dense = [matrix.clone() for _ in range(copies)]
    whole = [torch.randint(-127, 128, matrix.shape, dtype=torch.int8, generator=generator)]
    whole += [whole[0].clone() for _ in range(copies - 1)]
    of_x = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
    turn = count()
    runs: dict[str, Callable[[], object]] = {
        "torch bf16": lambda: torch.nn.functional.linear(x, dense[next(turn) % copies]),
        "torch._int_mm": lambda: torch._int_mm(of_x, whole[next(turn) % copies].T),
    }
    layer = torchao(matrix)
    if layer is not None:
        runs["torchao int8 x int8"] = lambda: layer(x)
    for name in FORMATS:
        spec = Quantized(name, (outputs, columns))
        stored = stored_copies(spec, cold // spec.nbytes + 1 if rows <= COLD_ROWS else 1)
        for product in (Native(), Activations()):

            def run(spec=spec, stored=stored, product=product) -> torch.Tensor:
                return spec.apply(x, *stored[next(turn) % len(stored)], product=product)

            runs[f"{name} {product}"] = run
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cold", type=int, default=300)
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peak = machine.peaks(refresh=True).multiply_adds_per_second["int8"]
    rows: list[dict[str, object]] = []
    alone: dict[str, list[float]] = {}
    for height, outputs, columns in SHAPES:
        if options.rows is not None and height not in options.rows:
            continue
        runs = contenders(height, outputs, columns, options.cold << 20)
        with torch.inference_mode():
            seconds = interleave(runs, options.rounds * (4 if height <= COLD_ROWS else 1))
        alone = seconds if height == 1 else alone
        for name in runs:
            median = spread(seconds[name])
            speed = height * outputs * columns / (median["median_us"] * 1e-6)
            row = {"rows": height, "weights": f"{outputs}x{columns}", "product": name, **median}
            row |= {
                "G_multiply_adds_per_s": speed / 1e9,
                "times_int_mm": ratio(seconds["torch._int_mm"], seconds[name]),
            }
            row |= {"times_torch_bf16": ratio(seconds["torch bf16"], seconds[name])}
            if height == 8 and alone:
                row["time_of_one_row"] = median["median_us"] / spread(alone[name])["median_us"]
            rows.append(row)
    # The probe too is slowed by other work: the better of before and after counts.
    peak = max(peak, machine.peaks(refresh=True).multiply_adds_per_second["int8"])
    for row in rows:
        row["of_peak"] = cast(float, row["G_multiply_adds_per_s"]) * 1e9 / peak
    save(__file__, rows)


if __name__ == "__main__":
    main()
