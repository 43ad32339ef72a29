"""Low rank: a matrix as the product of two narrower ones, dense or in few bits."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from torch import Tensor

from parco.fitting.factor import factorize, fisher_factors, rank_for, refit_left, scaled_factors
from parco.fitting.methods.method import Made, Method, Shape, check, matrix_shape, number
from parco.fitting.methods.quantize import Quantize
from parco.fitting.statistics import Statistics
from parco.formats import Format
from parco.weights import Dense, LowRank, Weight

Metric = Literal["auto", "plain", "activation", "fisher", "scaled"]


class Factored(Method):
    """Low rank: a right factor and a left one, which may be that of several matrices above each other."""

    @abc.abstractmethod
    def rank_of(self, shape: Shape) -> int:
        """The rank for a matrix of `shape`."""

    @abc.abstractmethod
    def part(self, shape: Shape) -> Weight:
        """The Weight of a factor of `shape`."""

    @abc.abstractmethod
    def stored(self, weight: Tensor, statistics: Statistics | None, rows: Sequence[int]) -> list[Made]:
        """The right factor, then the left one in parts of so many `rows`, each stored by itself."""

    def parts(self, columns: int, rows: Sequence[int]) -> list[Weight]:
        """The Weights of what `stored` gives for a matrix with these columns."""
        rank = self.rank_of((sum(rows), columns))
        return [self.part(shape) for shape in ((rank, columns), *((count, rank) for count in rows))]

    def __call__(self, weight: Tensor, statistics: Statistics | None = None) -> Made:
        check(weight, statistics, self)
        (right, right_tensors), (left, left_tensors) = self.stored(weight, statistics, [weight.shape[0]])
        return LowRank(left, right), (*left_tensors, *right_tensors)

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Weight:
        right, left = self.parts(shape[1], [shape[0]])
        return LowRank(left, right)

    @property
    def leaves_out(self) -> bool:
        return True

    @property
    def has_factors(self) -> bool:
        return True


@final
@dataclass(frozen=True)
class Factor(Factored):
    """Low rank: left [N, r] times right [r, K], both dense in `format`.

    Give `ratio`, the share of parameters kept, r(N + K)/(NK), from which the rank follows to the nearest multiple of
    16; or `rank` itself (at most the smaller side is taken). metric: "activation" is the optimum for the outputs on
    the inputs that were seen (SVD-LLM's), "fisher" weighs columns by their Fisher information (FWSVD), "scaled" by the
    size of their inputs (ASVD); all need statistics. "plain" is the truncated SVD, "auto" activation or plain.
    Text: `factor(0.5)`, `factor(rank=32)`, `factor(0.5,metric=plain,format=fp16)`.
    """

    ratio: float | None
    rank: int | None
    metric: Metric
    format: Format

    def __init__(
        self,
        ratio: float | None = None,
        rank: int | None = None,
        metric: Metric = "auto",
        format: Format | str = "bf16",
    ) -> None:
        form = Format.parse(format) if isinstance(format, str) else format
        if (ratio is None) == (rank is None):
            raise ValueError(f"Factor takes either ratio or rank, got ratio={ratio}, rank={rank}")
        if ratio is not None and not 0.0 < ratio <= 1.0:
            raise ValueError(f"ratio must be in (0, 1], the share of parameters kept, got {ratio}")
        if rank is not None and rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if metric not in get_args(Metric):
            raise ValueError(f"metric must be one of {', '.join(get_args(Metric))}, got {metric!r}")
        if not form.is_dense:
            raise ValueError(
                f"format of Factor must be fp32, bf16 or fp16, got {form}; write factor(...)>>{form} for few bits"
            )
        for name, value in (("ratio", ratio), ("rank", rank), ("metric", metric), ("format", form)):
            object.__setattr__(self, name, value)

    def rank_of(self, shape: Shape) -> int:
        return rank_for(self.ratio, shape) if self.ratio is not None else min(self.rank or 1, *shape)

    def factors(self, weight: Tensor, statistics: Statistics | None = None) -> tuple[Tensor, Tensor]:
        """(left [N, r], right [r, K]) in float32, before they are stored."""
        if self.needs_inputs and statistics is None:
            raise ValueError(f"{self} needs statistics of the layer's inputs; metric=plain does without")
        rank = self.rank_of(matrix_shape(weight))
        if statistics is None or statistics.empty or self.metric == "plain":
            return factorize(weight, rank)
        if self.metric in ("fisher", "scaled"):
            return (fisher_factors if self.metric == "fisher" else scaled_factors)(weight, rank, statistics)
        return factorize(weight, rank, statistics)

    def stored(self, weight: Tensor, statistics: Statistics | None, rows: Sequence[int]) -> list[Made]:
        left, right = self.factors(weight, statistics)
        return [_dense(part, self.format) for part in (right, *left.split(list(rows)))]

    def part(self, shape: Shape) -> Weight:
        return Dense(shape, self.format)

    @property
    def needs_inputs(self) -> bool:
        return self.metric not in ("auto", "plain")

    def __str__(self) -> str:
        arguments = [number(self.ratio) if self.ratio is not None else f"rank={self.rank}"]
        arguments += [f"metric={self.metric}"] if self.metric != "auto" else []
        arguments += [f"format={self.format}"] if str(self.format) != "bf16" else []
        return f"factor({','.join(arguments)})"


def _dense(matrix: Tensor, form: Format) -> Made:
    spec = Dense(matrix_shape(matrix), form)
    return spec, spec.encode(matrix)


@final
@dataclass(frozen=True)
class QuantizedFactors(Factored):
    """`factor >> quantize`: low-rank factors, each stored by `quantize`.

    `right` is rounded first, under the gram of x (its errors reach the output unchanged where `left` is
    orthonormal, which fisher's is not). Then `left` is fitted again, by least squares under the gram whatever metric
    chose `right`, to the right factor as it is stored, and rounded under the gram of right · x.
    """

    factor: Factor
    quantize: Quantize

    def stored(self, weight: Tensor, statistics: Statistics | None, rows: Sequence[int]) -> list[Made]:
        _, right = self.factor.factors(weight, statistics)
        seen = None if statistics is None or statistics.empty or self.factor.metric == "plain" else statistics
        target = weight.detach().float() if seen is None else seen.target(weight.detach().float())
        right_spec, right_tensors = self.quantize(right, None if statistics is None else statistics.without_cross)
        left, inner = refit_left(target, right_spec.dense(*right_tensors), seen)
        return [(right_spec, right_tensors), *(self.quantize(part, inner) for part in left.split(list(rows)))]

    def rank_of(self, shape: Shape) -> int:
        return self.factor.rank_of(shape)

    def part(self, shape: Shape) -> Weight:
        return self.quantize.spec(shape)

    @property
    def needs_inputs(self) -> bool:
        return self.factor.needs_inputs or self.quantize.needs_inputs

    def __str__(self) -> str:
        return f"{self.factor}>>{self.quantize}"
