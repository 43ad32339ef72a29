"""A coarse matrix and a low-rank correction of what it leaves over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from parco.fitting.methods.factor import Factored
from parco.fitting.methods.method import Made, Method, Shape, check, matrix_shape
from parco.fitting.methods.prune import Prune, QuantizedPrune
from parco.fitting.methods.quantize import Quantize
from parco.fitting.statistics import Statistics, row_error
from parco.weights import Sum, Weight

_SWEEPS = 2


@final
@dataclass(frozen=True)
class Corrected(Method):
    """`base + factor`: a quantized or pruned matrix and a low-rank correction of what it leaves over.

    The two are fitted in turn, each to what the other leaves (LoftQ, arXiv 2310.08659; SVDQuant, arXiv 2411.05007),
    twice, beginning with the correction, which takes the matrix's largest directions out of the base's way; the
    best state under the gram is kept.
    """

    base: Quantize | Prune | QuantizedPrune
    correction: Factored

    def __call__(self, weight: Tensor, statistics: Statistics | None = None) -> Made:
        check(weight, statistics, self)
        target = weight.detach().float()
        if statistics is not None:
            target = statistics.target(target)
            statistics = statistics.without_cross
        low_spec, low_tensors = self.correction(target, statistics)
        best: tuple[float, tuple[Tensor, ...]] | None = None
        spec = self.spec(matrix_shape(weight))
        for _ in range(_SWEEPS):
            low = low_spec.dense(*low_tensors)
            base_spec, base_tensors = self.base(target - low, statistics)
            residual = target - base_spec.dense(*base_tensors)
            best = _better(best, residual - low, statistics, (*base_tensors, *low_tensors))
            low_spec, low_tensors = self.correction(residual, statistics)
            best = _better(best, residual - low_spec.dense(*low_tensors), statistics, (*base_tensors, *low_tensors))
        assert best is not None
        return spec, best[1]

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Weight:
        return Sum(self.base.spec(shape), self.correction.spec(shape))

    @property
    def needs_inputs(self) -> bool:
        return self.base.needs_inputs or self.correction.needs_inputs

    @property
    def has_factors(self) -> bool:
        return True

    @property
    def leaves_out(self) -> bool:
        return self.base.leaves_out

    def __str__(self) -> str:
        return f"{self.base}+{self.correction}"


def _better(
    best: tuple[float, tuple[Tensor, ...]] | None,
    delta: Tensor,
    statistics: Statistics | None,
    tensors: tuple[Tensor, ...],
) -> tuple[float, tuple[Tensor, ...]]:
    """The state of less error: `best`, or the one that leaves `delta` [N, K] over."""
    if statistics is None or statistics.empty:
        error = float(delta.square().sum(dtype=torch.float64))
    else:
        error = float(row_error(delta, statistics.gram, statistics.count).sum(dtype=torch.float64))
    return (error, tensors) if best is None or error < best[0] else best
