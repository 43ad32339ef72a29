"""Zeros column by column, so that later columns repair the error of earlier ones (SparseGPT, arXiv 2301.00774).

The pass is that of feedback.py. Setting the compensated value v of column k to zero costs v² · D_kk, the paper's
v² / [H⁻¹]_kk with the inverse of what is left of H; when a span of 128 columns is reached the mask of the span is
chosen by that (for 2:4 the mask of every four), and what is set to zero is made up for by the columns after it. Where
the numbers that stay are integers under a scale of their row they are rounded in the same pass.

The paper compares all entries of a span; here every row of a span keeps as many as every other, so that what is stored
is a rectangle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parco.fitting.feedback import SPAN, over_rows, sweep
from parco.fitting.pattern import Pattern
from parco.fitting.search import IntegerGrid, reciprocal, search_scale
from parco.fitting.statistics import Statistics


@dataclass(frozen=True, eq=False)
class Pruned:
    """A matrix [N, K] float32 with zeros. scale: [N, 1] float32, of which its numbers are whole multiples; None where
    they are any.
    """

    values: Tensor
    scale: Tensor | None


def sparsegpt(weight: Tensor, statistics: Statistics, pattern: Pattern, grid: IntegerGrid | None = None) -> Pruned:
    """`weight` [N, K] with the zeros of `pattern`, aiming at `statistics.target(weight)` under the gram; what stays is
    rounded to `grid`, where it is given: symmetric, with one scale for a row.

    Columns that were dead in calibration become zero. Raises ValueError when the widths differ or nothing was seen.
    """
    if weight.shape[1] != statistics.columns:
        raise ValueError(f"weight has {weight.shape[1]} columns, the statistics have {statistics.columns}")
    assert grid is None or grid.by_row
    factor, _ = statistics.root
    weight = weight.detach()
    values = torch.empty(weight.shape, device=weight.device)
    scale = None if grid is None else torch.empty(weight.shape[0], 1, device=weight.device)

    def run(first: int, last: int) -> None:
        target = statistics.target(weight[first:last].float()).T.clone(memory_format=torch.contiguous_format)
        target[statistics.dead] = 0.0
        step = None
        if grid is not None and scale is not None:
            step = search_scale(target[None], factor.diagonal().square()[None], grid)[0][0, 0]
            scale[first:last, 0] = step
        values[first:last] = _solve(target, factor, pattern, grid, step).T

    over_rows(weight.shape[0], run, multiple=pattern.block)
    return Pruned(values, scale)


def _solve(
    target_KN: Tensor, factor: Tensor, pattern: Pattern, grid: IntegerGrid | None, scale_N: Tensor | None
) -> Tensor:
    """The stored values [K, N] of some rows of the matrix."""
    stored, delta, keep = (torch.zeros_like(target_KN) for _ in range(3))
    inverse = None if scale_N is None else reciprocal(scale_N)
    pivots = factor.diagonal()[:, None]

    def choose(first: int, last: int, values: Tensor) -> None:
        # With the terms of the span's own columns: while undecided, they only make up for what was decided before.
        unit = (factor[first:last, first:last] / pivots[first:last].T).T
        target = target_KN[first:last]
        moved = torch.linalg.solve_triangular(unit, values - target, upper=False, unitriangular=True)
        keep[first:last] = pattern.keep(((target + moved) * pivots[first:last]).square_().T, first).T

    def decide(column: int, value: Tensor) -> None:
        if grid is not None and scale_N is not None and inverse is not None:
            value.mul_(inverse).round_().clamp_(grid.low, grid.high).mul_(scale_N)
        torch.mul(value, keep[column], out=stored[column])
        torch.sub(target_KN[column], stored[column], out=delta[column])

    columns = target_KN.shape[0]
    spans = [(start, min(start + SPAN, columns)) for start in range(0, columns, SPAN)]
    if pattern.window is None:
        sweep(target_KN, delta, factor, spans, decide, reach=choose)
    else:
        sweep(target_KN, delta, factor, spans, decide, near=choose, block=pattern.window)
    return stored
