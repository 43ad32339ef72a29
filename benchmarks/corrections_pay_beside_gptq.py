"""Claim: at equal bytes, scales and factors counted, a low-rank correction of a quantized matrix keeps more of a
language model than GPTQ alone; or the table shows where it stops paying.

4.25 and 3 bits in all for each number of the model's linear layers. What factors and scales of inputs take, the codes
go without: a matrix has the most bits, and then the smallest groups, with which it still fits, and some have the next
smaller ones as long as the model fits. Where a rank does not fit at all, a matrix takes half of it.

    rtn              rounded to nearest under searched scales
    gptq             with coordinate descent; "act-order" with the columns of large inputs first
    awq              scaled columns (arXiv 2306.00978), rounded to nearest; or by GPTQ
    quarot           Hadamard-rotated (arXiv 2404.00456), rounded to nearest; or by GPTQ
    loftq            rounded to nearest and corrected by a plain SVD, in turn (arXiv 2310.08659)
    caldera          GPTQ and factors of the activation metric, in turn (arXiv 2405.18886), here too in int4
    svdquant         loftq under scaled columns (arXiv 2411.05007)

Every method works on what the blocks changed before it produce, and all but plain rounding aim at the outputs of the
original, as `parco fit` does. KL from the original, nats per token, on the shipped model's held-out text and on
another; nothing is healed, the embedding and the head are kept.

    python benchmarks/corrections_pay_beside_gptq.py [--work DIR]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import compressed
import torch
from interleaved import save

from parco.fitting.methods import Method, parse
from parco.fitting.statistics import Statistics
from parco.nn.blocks import Group, matrix

BUDGETS = (4.25, 3.0)
RANKS = (8, 16, 32, 64)
ALONE = {
    "rtn": "{base}@rtn",
    "gptq": "{base}@gptq",
    "gptq act-order": "{base}@actorder",
    "awq": "scale>>{base}@rtn",
    "awq, gptq": "scale>>{base}@actorder",
    "quarot": "rotate>>{base}@rtn",
    "quarot, gptq": "rotate>>{base}@actorder",
}
CORRECTED = {
    "caldera": "{base}@actorder+factor(rank={rank})>>int4:32",
    "loftq": "{base}@rtn+factor(rank={rank},metric=plain)>>int4:32@rtn",
    "svdquant": "scale>>{base}@rtn+factor(rank={rank},metric=plain)>>int4:32@rtn",
}
FORMATS = [f"int{bits}:{group}" for bits in range(8, 1, -1) for group in range(16, 129, 16)]
"""The most bits first, then the smallest groups."""
COARSE = [f"int2:{group}" for group in (160, 192, 224, 256, 288, 320)]
"""Where none of those fits."""


def chosen(pattern: str, rank: int, shapes: Mapping[str, tuple[int, int]], budget: float) -> dict[str, Method]:
    """For every matrix the first format that takes no more than `budget` bits; then, one matrix after the other, the
    next smaller groups, as long as the model takes no more.
    """
    found: dict[str, Method] = {}
    better: dict[str, Method] = {}
    left = 0.0
    for name, shape in shapes.items():
        low = rank
        while True:
            tried = [parse(pattern.format(base=base, rank=low)) for base in (*FORMATS, *COARSE)]
            fits = [method for method in tried if total(method, shape) <= budget * shape[0] * shape[1]]
            if fits:
                break
            low //= 2
        found[name] = fits[0]
        left += budget * shape[0] * shape[1] - total(fits[0], shape)
        place = tried.index(fits[0])
        better[name] = tried[place - 1] if place % 8 else fits[0]
    for name, shape in shapes.items():
        more = total(better[name], shape) - total(found[name], shape)
        if 0 < more <= left:
            found[name], left = better[name], left - more
    return found


def total(method: Method, shape: tuple[int, int]) -> int:
    """Bits of a matrix, everything that is stored counted."""
    return 8 * method.spec(shape).nbytes


def stored(methods: Mapping[str, Method]) -> compressed.Change:
    def change(model: Any, group: Group, seen: dict[str, Statistics]) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = {}
        for member in group.members:
            spec, tensors = methods[member](matrix(model, member).float().contiguous(), seen[member])
            made[member] = spec.dense(*tensors)
        return made

    return change


def methods() -> Iterator[tuple[str, str, int]]:
    """Name, pattern and rank."""
    yield from ((name, pattern, 0) for name, pattern in ALONE.items())
    yield from ((name, pattern, rank) for name, pattern in CORRECTED.items() for rank in RANKS)


def shapes_of(judged: compressed.Judged) -> dict[str, tuple[int, int]]:
    """Of all linear layers."""
    model = judged.load()
    matrices = {member: matrix(model, member) for group in judged.linear_groups for member in group.members}
    return {name: (each.shape[0], each.shape[1]) for name, each in matrices.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/compressed"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = compressed.Rows(options.work / "corrections.json")
    judged = compressed.shipped(options.work)
    shapes = shapes_of(judged)
    numbers = sum(rows * columns for rows, columns in shapes.values())
    done: list[dict[str, Method]] = []
    for (name, pattern, rank), budget in itertools.product(methods(), BUDGETS):
        plan = chosen(pattern, rank, shapes, budget)
        if plan in done:  # no higher rank fits
            continue
        done.append(plan)
        rows.add(
            judged,
            lambda p=plan: compressed.in_turn(judged, stored(p)),
            compressed.Judged.divergences,
            budget=budget,
            method=name,
            rank=rank,
            bits=round(sum(total(plan[name], shape) for name, shape in shapes.items()) / numbers, 3),
        )
    save(__file__, rows.rows)


if __name__ == "__main__":
    main()
