"""Rounding to formats whose numbers are floats or a table: fp8, MX, NVFP4, NF4, ternary; to nearest, and by GPTQ.

The pass of GPTQ is that of feedback.py; a column's decision is the level of the format nearest to the compensated
value, under scales searched beforehand (scales.py), each column of a block weighing what its error costs in the pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parco.fitting.feedback import SPAN, over_rows, sweep
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


def gptq_levels(weight: Tensor, statistics: Statistics, format: Format, *, ordered: bool = False) -> tuple[Tensor, ...]:
    """The stored tensors of `weight` [N, K], rounded column by column under the gram of `statistics`, aiming at
    `statistics.target(weight)`; `ordered` takes the columns of the largest inputs first.

    Columns that were dead in calibration become zero. Raises ValueError when the widths differ or nothing was seen.
    """
    if weight.shape[1] != statistics.columns:
        raise ValueError(f"weight has {weight.shape[1]} columns, the statistics have {statistics.columns}")
    rows, columns = weight.shape
    order, (factor, _) = statistics.ordered_root if ordered else (torch.arange(columns), statistics.root)
    target = statistics.target(weight.detach().float()).clone()
    target[:, statistics.dead] = 0.0
    scales = searched(target, format, factor.diagonal()[order.argsort()].square())
    numbers, zeros = scale_numbers(format, scales), scales.get("zero")
    levels = levels_of(format.element).to(weight.device)
    middles = (levels[1:] + levels[:-1]) / 2
    spans = [(start, min(start + SPAN, columns)) for start in range(0, columns, SPAN)]
    stored = torch.empty_like(target)

    def run(first: int, last: int) -> None:
        aim = target[first:last].T[order].contiguous()
        delta, decided = torch.zeros_like(aim), torch.empty_like(aim)

        def spread(per_block: Tensor) -> Tensor:
            own = per_block[scale_rows(range(first, last), format.block)]
            return per_element(own, format.block, (last - first, columns)).T[order]

        scale = torch.ones_like(aim) if numbers is None else spread(numbers)
        inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
        least = None if zeros is None else -spread(zeros).float()

        def decide(column: int, value: Tensor) -> None:
            value.mul_(inverse[column])
            if least is None:
                level = levels[torch.bucketize(value, middles)]
            else:
                level = value.round_().clamp_(least[column], least[column] + (len(levels) - 1))
            torch.mul(level, scale[column], out=decided[column])
            torch.sub(aim[column], decided[column], out=delta[column])

        sweep(aim, delta, factor, spans, decide)
        stored[first:last, order] = decided.T

    over_rows(rows, run, format.block.rows or 1)
    return tuple(written(stored, format, scales).tensors.values())
