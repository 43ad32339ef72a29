"""Low rank for matrices that read one input: one right factor for all, and a left one for each."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from parco.fitting.methods.factor import Factored
from parco.fitting.methods.method import Made, Method, Shape, check, matrix_shape
from parco.fitting.statistics import Statistics
from parco.weights import LowRank, Shared, Weight


@final
@dataclass(frozen=True)
class Joint(Method):
    """`factors` of the matrices of a group above each other: their right factor [r, K] is stored once, and multiplies
    the input once (`weights.Shared`).

    With the outputs of all members above each other the best factors are those of one matrix [N₁ + N₂ + …, K] under the
    gram of their common input, so metrics, shifted inputs and the ratio mean what they do in `Factor`; one gram and one
    basis serve q, k and v. It pays where the members' input directions overlap: at one size the rank is
    r(ΣN + K) = ratio·ΣN·K, where factors apart spend r·K on each. A matrix that is a group of its own gets
    `factors`. Text: `joint(0.5)`, `joint(rank=64,metric=plain)`, `joint(0.5)>>int8:row`.
    """

    together: ClassVar[bool] = True
    factors: Factored

    def __call__(self, weight: Tensor, statistics: Statistics | None = None) -> Made:
        return self.factors(weight, statistics)

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Weight:
        return self.factors.spec(shape, dtype)

    def alone(self) -> Method:
        return self.factors

    def each(self, members: Iterable[tuple[Tensor, Statistics | None]]) -> Iterator[Made]:
        """Raises ValueError where members have different widths: they read different inputs."""
        weights, seen = zip(*members, strict=True)
        if len(weights) == 1:
            yield self.factors(weights[0], seen[0])
            return
        for weight, statistics in zip(weights, seen, strict=True):
            check(weight, statistics, self)
        _check_width([matrix_shape(weight) for weight in weights], self)
        stacked, statistics = _last.get(weights, seen)
        (right, tensors), *lefts = self.factors.stored(stacked, statistics, [len(weight) for weight in weights])
        for left, own in lefts:
            yield LowRank(left, Shared(right)), (*own, *tensors)

    def specs(self, shapes: Sequence[Shape], dtype: torch.dtype = torch.bfloat16) -> list[Weight]:
        if len(shapes) == 1:
            return [self.factors.spec(shapes[0], dtype)]
        right, *lefts = self.products(shapes)
        return [LowRank(left, Shared(right)) for left in lefts]

    def products(self, shapes: Sequence[Shape]) -> list[Weight]:
        if len(shapes) == 1:
            return self.specs(shapes)
        _check_width(shapes, self)
        return self.factors.parts(shapes[0][1], [rows for rows, _ in shapes])

    @property
    def has_factors(self) -> bool:
        return True

    @property
    def leaves_out(self) -> bool:
        return True

    def __str__(self) -> str:
        return f"joint{str(self.factors).removeprefix('factor')}"


def _check_width(shapes: Sequence[Shape], method: Method) -> None:
    if len({columns for _, columns in shapes}) != 1:
        raise ValueError(f"{method}: the matrices {list(shapes)} have several widths; those that read one input share")


class _Last:
    """The members stacked last, and their statistics: candidates of one group differ in rank, and the basis of what is
    the same object is found once (`fitting/factor.py`). Holds no member alive.
    """

    def __init__(self) -> None:
        self.of: list[tuple[weakref.ref[Any], int]] = []
        self.made: tuple[Tensor, Statistics | None] | None = None

    def get(self, weights: Sequence[Tensor], seen: Sequence[Statistics | None]) -> tuple[Tensor, Statistics | None]:
        now = [
            (each, each._version if isinstance(each, Tensor) else 0) for each in (*weights, *seen) if each is not None
        ]
        same = [(held(), version) for held, version in self.of]
        alike = len(now) == len(same) and all(a is b and v == w for (a, v), (b, w) in zip(now, same, strict=True))
        if self.made is None or not alike:
            self.of = [(weakref.ref(each, lambda _: self.drop()), version) for each, version in now]
            self.made = torch.cat([weight.detach().float() for weight in weights]), _together(seen)
        return self.made

    def drop(self) -> None:
        self.of, self.made = [], None


_last = _Last()


def _together(seen: Sequence[Statistics | None]) -> Statistics | None:
    """Of all members' outputs: their input is one, and Fisher information adds up over what reads it."""
    first = seen[0]
    if first is None:
        return None
    fishers = [each.fisher for each in seen if each is not None and each.fisher is not None]
    fisher = torch.stack(fishers).sum(0) if len(fishers) == len(seen) else None
    return replace(first, row_energy=None, fisher=fisher)
