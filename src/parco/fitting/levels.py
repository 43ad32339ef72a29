"""GPTQ for formats whose numbers are floats or a table: fp8, MX, NVFP4, NF4, ternary.

The pass is that of feedback.py; a column's decision is the level of the format nearest to the compensated value, under
scales that the format's own rule finds on the matrix beforehand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parco.fitting.feedback import SPAN, over_rows, sweep
from parco.fitting.statistics import Statistics
from parco.formats import Format, Integer
from parco.kernels.cast import encode
from parco.kernels.cast.codes import per_element
from parco.kernels.cast.decoding import element_values
from parco.kernels.cast.scaling import scale_numbers


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
    scales = {name: tensor for name, tensor in encode(target, format).tensors.items() if name != "codes"}
    numbers = scale_numbers(format, scales)
    levels = element_values(format.element).to(weight.device)
    levels = levels[levels.isfinite()].unique()
    if isinstance(format.element, Integer) and format.bits == 8:
        levels = levels[1:]  # −128, which casts leave out as the kernels' products do
    middles = (levels[1:] + levels[:-1]) / 2
    spans = [(start, min(start + SPAN, columns)) for start in range(0, columns, SPAN)]
    stored = torch.empty_like(target)

    def run(first: int, last: int) -> None:
        aim = target[first:last].T[order].contiguous()
        delta, decided = torch.zeros_like(aim), torch.empty_like(aim)
        scale = torch.ones_like(aim)
        if numbers is not None:
            scale = per_element(numbers, format.block, (rows, columns))[first:last].T[order]
        inverse = torch.where(scale == 0, 0.0, 1.0 / scale)

        def decide(column: int, value: Tensor) -> None:
            level = levels[torch.bucketize(value.mul_(inverse[column]), middles)]
            torch.mul(level, scale[column], out=decided[column])
            torch.sub(aim[column], decided[column], out=delta[column])

        sweep(aim, delta, factor, spans, decide)
        stored[first:last, order] = decided.T

    over_rows(rows, run)
    encoded = encode(stored, format, scale=scales.get("scale"), global_scale=scales.get("global_scale"))
    return tuple(encoded.tensors[name] for name in format.tensors((rows, columns)))
