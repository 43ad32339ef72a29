"""Other coordinates for the inputs, in which a matrix is stored with less error: scales of its columns, a rotation."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from torch import Tensor

from parco.fitting.methods.correct import Corrected
from parco.fitting.methods.method import Made, Method, Shape, check, number, output_error
from parco.fitting.methods.quantize import Keep
from parco.fitting.statistics import Statistics
from parco.formats import DTYPE_NAMES
from parco.kernels.cast import turned
from parco.weights import Dense, Rotated, Scaled, Weight

Rule = Literal["awq", "smoothquant"]
DTYPE = torch.bfloat16
"""Of the stored scales."""

EXPONENTS = tuple(step / 10 for step in range(11))
"""Tried by AWQ's search; 0 leaves the matrix as it is."""
SMOOTH = 0.5
"""SmoothQuant's exponent where none is given, the paper's."""
_FLOOR = 1e-4
"""Least share of the greatest column's size that a column is taken to have, so that scales stay within fp16's range."""
_ROWS = 256


class Transform(Method):
    """A change of coordinates, T of the inputs and T⁻¹ of the matrix, which leaves their product what it was.

    By itself it stores the matrix dense; `transform >> method` stores T's matrix by `method`.
    """

    @abc.abstractmethod
    def change(
        self, weight: Tensor, statistics: Statistics | None, then: Method
    ) -> tuple[Tensor, Statistics | None, tuple[Tensor, ...]]:
        """The matrix [N, K] float32 and the statistics in the new coordinates, for `then` to work on, and the tensors
        that `around` has besides those of what it is around.
        """

    @abc.abstractmethod
    def around(self, inner: Weight) -> Weight:
        """The Weight that stands for the matrix of which `inner` is the one in the new coordinates."""

    def __call__(self, weight: Tensor, statistics: Statistics | None = None) -> Made:
        return Transformed(self, Keep())(weight, statistics)

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Weight:
        return Transformed(self, Keep()).spec(shape, dtype)


@final
@dataclass(frozen=True)
class Transformed(Method):
    """`transform >> then`: what `then` makes of the matrix and the statistics in the coordinates of `transform`."""

    transform: Transform
    then: Method

    def __call__(self, weight: Tensor, statistics: Statistics | None = None) -> Made:
        check(weight, statistics, self)
        target = weight.detach()
        if statistics is not None:
            target = statistics.target(target.float())
            statistics = statistics.without_cross
        changed, seen, own = self.transform.change(target.float(), statistics, self.then)
        inner, tensors = self.then(changed.to(weight.dtype) if isinstance(self.then, Keep) else changed, seen)
        return self.transform.around(inner), (*tensors, *own)

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Weight:
        return self.transform.around(self.then.spec(shape, dtype))

    @property
    def needs_inputs(self) -> bool:
        return self.transform.needs_inputs or self.then.needs_inputs

    @property
    def has_factors(self) -> bool:
        return self.then.has_factors

    @property
    def leaves_out(self) -> bool:
        return self.then.leaves_out

    @property
    def rows_apart(self) -> bool:
        return self.transform.rows_apart and self.then.rows_apart

    def __str__(self) -> str:
        return f"{self.transform}>>{self.then}"


@final
@dataclass(frozen=True)
class Scale(Transform):
    """Columns multiplied by s before they are stored, and inputs divided by it, one number for each.

    rule: "awq", s = E|x|^exponent (arXiv 2306.00978): columns of large inputs get finer steps. Without an exponent the
    one of EXPONENTS is taken under which the next method errs least on some rows (of a correction its base counts).
    "smoothquant", s = max|x|^exponent / max|w|^(1 − exponent) (arXiv 2211.10438), by default 0.5: inputs become as even
    as the matrix, so that they can be rounded to int8 too. Needs statistics; an expert that no token reached is scaled
    by ones. Text: `scale>>int4:64`, `scale(0.5)>>…`, `scale(rule=smoothquant)>>int8:row`.
    """

    exponent: float | None = None
    rule: Rule = "awq"

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"rule must be one of {', '.join(get_args(Rule))}, got {self.rule!r}")
        if self.exponent is not None and not 0.0 <= self.exponent <= 1.0:
            raise ValueError(f"exponent must be in [0, 1], got {self.exponent}")

    def change(
        self, weight: Tensor, statistics: Statistics | None, then: Method
    ) -> tuple[Tensor, Statistics | None, tuple[Tensor, ...]]:
        if statistics is None:
            raise ValueError(f"{self} needs statistics of the layer's inputs")
        exponent = self.exponent
        if statistics.empty:
            stored = torch.ones(weight.shape[1])
        elif self.rule == "smoothquant":
            stored = self._stored(weight, statistics, SMOOTH if exponent is None else exponent)
        elif exponent is not None:
            stored = self._stored(weight, statistics, exponent)
        else:
            stored = self._searched(weight, statistics, then)
        changed, seen = _divided(weight, statistics, stored)
        return changed, seen, (stored[None].to(DTYPE),)

    def _searched(self, weight: Tensor, statistics: Statistics, then: Method) -> Tensor:
        """Of the scales of all EXPONENTS those under which `then` errs least on evenly spaced rows."""
        tried = then.base if isinstance(then, Corrected) else then
        some = weight[:: -(-weight.shape[0] // _ROWS)] if tried.rows_apart else weight
        best: tuple[float, Tensor] | None = None
        for exponent in EXPONENTS:
            stored = self._stored(weight, statistics, exponent)
            changed, seen = _divided(some, statistics, stored)
            error = float(output_error(changed, *tried(changed, seen), seen).sum(dtype=torch.float64))
            best = (error, stored) if best is None or error < best[0] else best
        assert best is not None
        return best[1]

    def _stored(self, weight: Tensor, statistics: Statistics, exponent: float) -> Tensor:
        """What inputs are multiplied by, 1/s of a geometric middle of 1, [K] float32 as it is stored."""
        if self.rule == "awq":
            sizes = _above(statistics.magnitude, self) ** exponent
        else:
            rows = _above(weight.abs().amax(0), self)
            sizes = _above(statistics.peak, self) ** exponent / rows ** (1.0 - exponent)
        middle = (sizes.amax() * sizes.amin()).sqrt()
        return (middle / sizes).to(DTYPE).float()

    def around(self, inner: Weight) -> Weight:
        return Scaled(inner, Dense((1, inner.shape[1]), DTYPE_NAMES[DTYPE]))

    @property
    def needs_inputs(self) -> bool:
        return True

    @property
    def rows_apart(self) -> bool:
        return self.rule == "awq" and self.exponent is not None

    def __str__(self) -> str:
        arguments = [number(self.exponent)] if self.exponent is not None else []
        arguments += [f"rule={self.rule}"] if self.rule != "awq" else []
        return f"scale({','.join(arguments)})" if arguments else "scale"


@final
@dataclass(frozen=True)
class Rotate(Transform):
    """Rows and inputs under a random Hadamard transform of every 128 neighbours, its signs drawn from `seed` (QuIP#,
    arXiv 2402.04396; QuaRot, arXiv 2404.00456): outliers are spread over their block, so that no scale of integers has
    to span them. Text: `rotate>>int4:64`, `rotate(1)>>int4:64`.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must lie in [0, 2**64), got {self.seed}")

    def change(
        self, weight: Tensor, statistics: Statistics | None, then: Method
    ) -> tuple[Tensor, Statistics | None, tuple[Tensor, ...]]:
        return turned(weight, self.seed), None if statistics is None else statistics.turned(self.seed), ()

    def around(self, inner: Weight) -> Weight:
        return Rotated(inner, self.seed)

    def __str__(self) -> str:
        return f"rotate({self.seed})" if self.seed else "rotate"


def _divided(weight: Tensor, statistics: Statistics, stored: Tensor) -> tuple[Tensor, Statistics]:
    """The matrix and its statistics where inputs are multiplied by `stored`."""
    return weight / stored, statistics.divided(1.0 / stored)


def _above(sizes: Tensor | None, method: Method) -> Tensor:
    """Sizes of columns in units of the greatest, none below _FLOOR."""
    if sizes is None:
        raise ValueError(f"{method}: the statistics hold no sizes of the inputs; Statistics.of and calibrate give them")
    return (sizes.float() / sizes.amax().clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=_FLOOR)
