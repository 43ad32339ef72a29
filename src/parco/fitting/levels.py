"""Rounding to formats whose numbers are floats or a table: fp8, MX, NVFP4, NF4, ternary; to nearest, and by GPTQ.

The pass of GPTQ is that of feedback.py; a column's decision is the level of the format nearest to the compensated
value, under scales searched beforehand (scales.py), each column of a block weighing what its error costs in the pass.
Sweeps of coordinate descent follow, as for integers (gptq.py), without their step on the scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from parco.fitting.feedback import SPAN, over_rows, sweep
from parco.fitting.gptq import SWEEPS
from parco.fitting.scales import levels_of, searched, written
from parco.fitting.statistics import Statistics
from parco.formats import Format
from parco.kernels.cast.codes import per_element
from parco.kernels.cast.scaling import scale_numbers
from parco.kernels.cast.tiles import scale_rows


def rtn_levels(weight: Tensor, format: Format, importance_K: Tensor | None = None) -> tuple[Tensor, ...]:
    """The stored tensors of `weight` [N, K], to nearest under searched scales; `importance_K` are summed squares of the
    inputs, None for ones.
    """
    return tuple(written(weight, format, searched(weight, format, importance_K)).tensors.values())


def gptq_levels(
    weight: Tensor, statistics: Statistics, format: Format, sweeps: int | None = None, *, ordered: bool = False
) -> tuple[Tensor, ...]:
    """The stored tensors of `weight` [N, K], rounded column by column under the gram of `statistics`, aiming at
    `statistics.target(weight)`; `ordered` takes the columns of the largest inputs first. `sweeps` of coordinate descent
    follow (default: those of integers of as many bits, of 7 and 8 one).

    Columns that were dead in calibration become zero. Raises ValueError when the widths differ or nothing was seen.
    """
    if weight.shape[1] != statistics.columns:
        raise ValueError(f"weight has {weight.shape[1]} columns, the statistics have {statistics.columns}")
    rows, columns = weight.shape
    order, (factor, ridge) = statistics.ordered_root if ordered else (torch.arange(columns), statistics.root)
    target = statistics.target(weight.detach().float()).clone()
    target[:, statistics.dead] = 0.0
    scales = searched(target, format, factor.diagonal()[order.argsort()].square())
    spans = [(start, min(start + SPAN, columns)) for start in range(0, columns, SPAN)]
    count = SWEEPS.get(format.bits, 1) if sweeps is None else sweeps
    stored, original = torch.empty_like(target), order.tolist()

    def run(first: int, last: int) -> None:
        nearest = _Nearest(format, scales, range(first, last), columns, target.device)
        own = target[first:last].T.contiguous()
        decided, aim = torch.empty_like(own), own[order]
        delta = torch.zeros_like(aim)

        def decide(column: int, value: Tensor) -> None:
            index = original[column]
            torch.sub(aim[column], nearest(index, value, out=decided[index]), out=delta[column])

        sweep(aim, delta, factor, spans, decide)
        for _ in range(count):
            _refine(own, decided, statistics.gram, ridge, spans, nearest)
        stored[first:last] = decided.T

    over_rows(rows, run, format.block.rows or 1)
    return tuple(written(stored, format, scales).tensors.values())


class _Nearest:
    """What is stored of a column of values, of some rows of a matrix, under scales that are there."""

    def __init__(
        self, format: Format, scales: Mapping[str, Tensor], rows: range, columns: int, device: torch.device
    ) -> None:
        numbers, zeros = scale_numbers(format, scales), scales.get("zero")

        def spread(per_block: Tensor) -> Tensor:
            own = per_block[scale_rows(rows, format.block)]
            return per_element(own, format.block, (len(rows), columns)).T.contiguous()

        self.scale = None if numbers is None else spread(numbers)
        self.inverse = None if self.scale is None else torch.where(self.scale == 0, 0.0, 1.0 / self.scale)
        self.least = None if zeros is None else -spread(zeros).float()
        self.levels = levels_of(format.element).to(device)
        self.middles = (self.levels[1:] + self.levels[:-1]) / 2

    def __call__(self, column: int, value: Tensor, out: Tensor) -> Tensor:
        """`value` [rows] is overwritten."""
        if self.inverse is not None:
            value.mul_(self.inverse[column])
        if self.least is None:
            torch.index_select(self.levels, 0, torch.bucketize(value, self.middles), out=out)
        else:
            least = self.least[column]
            torch.clamp(value.round_(), least, least + (len(self.levels) - 1), out=out)
        return out if self.scale is None else out.mul_(self.scale[column])


def _refine(
    target: Tensor, decided: Tensor, gram: Tensor, ridge: float, spans: Sequence[tuple[int, int]], nearest: _Nearest
) -> None:
    """One sweep of coordinate descent under gram + ridge · I over `decided` [K, N]: every column's best numbers given
    all others."""
    delta = target - decided
    for start, stop in spans:
        pull = torch.mm(gram[start:stop].float(), delta).add_(delta[start:stop], alpha=ridge)
        local = gram[start:stop, start:stop].float()
        local = local + ridge * torch.eye(stop - start, device=local.device)
        moved = torch.empty_like(pull)
        for row, curvature in enumerate(local.diagonal().tolist()):
            now = decided[start + row]
            value = torch.addmv(pull[row], moved[:row].T, local[row, :row], alpha=-1.0).div_(curvature).add_(now)
            best = nearest(start + row, value, out=torch.empty_like(now))
            torch.sub(best, now, out=moved[row])
            now.copy_(best)
        delta[start:stop] -= moved
