"""Claim: at equal bytes, scales and factors counted, a low-rank correction of a quantized matrix keeps more of a
language model than GPTQ alone; or the table shows where it stops paying.

4.25 and 3 bits in all for each number of the model's linear layers. What factors and scales of inputs take, the codes
go without: the codes have the most bits, and then the smallest groups, with which the model still fits, and those of
some matrices the next smaller groups. Keys and values, of 64 rows, have rank 16 at most.

    rtn              rounded to nearest under searched scales
    gptq             with coordinate descent; "act-order" with the columns of large inputs first; "mixed" with widths
                     allocated over the matrices by a fit's solver
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
from collections.abc import Iterator, Mapping
from pathlib import Path

import compressed
import torch
from interleaved import save

from parco.fitting.methods import Method, output_error, parse
from parco.fitting.plan import Option
from parco.nn.blocks import matrix

RANKS = (8, 16, 32, 64)
ALONE = {
    "rtn": "{base}@rtn",
    "gptq": "{base}@gptq",
    "gptq act-order": "{base}@actorder",
    "awq": "scale>>{base}@rtn",
    "awq, gptq": "scale>>{base}@gptq",
    "quarot": "rotate>>{base}@rtn",
    "quarot, gptq": "rotate>>{base}@gptq",
}
CORRECTED = {
    "caldera": "{base}@gptq+factor(rank={rank})>>int4:32",
    "loftq": "{base}@rtn+factor(rank={rank},metric=plain)>>int4:32@rtn",
    "svdquant": "scale>>{base}@rtn+factor(rank={rank},metric=plain)>>int4:32@rtn",
}
MIXED = [f"int{bits}:{group}@gptq" for bits in range(2, 7) for group in (32, 64, 128)]
FORMATS = [f"int{bits}:{group}" for bits in range(8, 1, -1) for group in range(16, 129, 16)]
"""The most bits first, then the smallest groups."""


def chosen(pattern: str, rank: int, shapes: Mapping[str, tuple[int, int]], budget: float) -> dict[str, Method] | None:
    """For all matrices the first format with which the model takes no more than `budget` bits for each number; then,
    one matrix after the other, the next smaller groups, as long as it takes no more. None where nothing fits.
    """
    tried = [{name: _method(pattern, rank, shape, base) for name, shape in shapes.items()} for base in FORMATS]
    limit = budget * sum(rows * columns for rows, columns in shapes.values())
    place = next((place for place, plan in enumerate(tried) if total(plan, shapes) <= limit), None)
    if place is None:
        return None
    found, better = dict(tried[place]), tried[place - (place % 8 > 0)]
    for name, method in better.items():
        if total({**found, name: method}, shapes) <= limit:
            found[name] = method
    return found


def _method(pattern: str, rank: int, shape: tuple[int, int], base: str) -> Method:
    """With at most a quarter of the rank that the matrix may have."""
    return parse(pattern.format(base=base, rank=min(rank, min(shape) // 4)))


@torch.no_grad()
def mixed(judged: compressed.Judged, budget: float) -> dict[str, Method]:
    """For every matrix one of MIXED, by the least predicted loss of all within `budget` bits for each number."""
    model, options, numbers = judged.load(), dict[str, list[Option]](), 0
    for group in judged.linear_groups:
        for member, seen in judged.statistics(group).items():
            weight = matrix(model, member).float().contiguous()
            assert seen.row_energy is not None
            options[member], numbers = [], numbers + weight.numel()
            for text in MIXED:
                spec, tensors = parse(text)(weight, seen)
                loss = 0.5 * float((output_error(weight, spec, tensors, seen) * seen.row_energy).sum())
                options[member].append(Option(text, spec.nbytes, loss, 0.0, 0.0))
    return {member: parse(text) for member, text in compressed.allocated(options, budget * numbers / 8).items()}


def total(plan: Mapping[str, Method], shapes: Mapping[str, tuple[int, int]]) -> int:
    """Bits of all matrices, everything that is stored counted."""
    return sum(8 * method.spec(shapes[name]).nbytes for name, method in plan.items())


def methods() -> Iterator[tuple[str, str, int]]:
    """Name, pattern and rank; no pattern where widths are mixed."""
    yield "gptq mixed", "", 0
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
    parser.add_argument("--bits", default="4.25,3")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    judged = compressed.shipped(options.work)
    shapes = shapes_of(judged)
    numbers = sum(rows * columns for rows, columns in shapes.values())
    found: list[dict[str, object]] = []
    for budget in map(float, options.bits.split(",")):
        rows = compressed.Rows(options.work / f"corrections-{budget:g}.json")
        for name, pattern, rank in methods():
            plan = chosen(pattern, rank, shapes, budget) if pattern else mixed(judged, budget)
            if plan is not None:
                rows.add(
                    judged,
                    lambda p=plan: compressed.in_turn(judged, compressed.stored(p.__getitem__)),
                    compressed.Judged.divergences,
                    budget=budget,
                    method=name,
                    rank=rank,
                    bits=round(total(plan, shapes) / numbers, 3),
                )
        found += rows.rows
    save(__file__, found)


if __name__ == "__main__":
    main()
