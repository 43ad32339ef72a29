"""What it means to be a Method, and how far from a matrix what one has made of it is."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from parco.fitting.statistics import Statistics, row_error
from parco.weights import Weight

Made = tuple[Weight, tuple[Tensor, ...]]
Shape = tuple[int, int]


class Method(abc.ABC):
    """How a matrix becomes a Weight. Subclasses are final frozen dataclasses.

    A new one is also read in `parse` and named in `KNOWN` (text.py); what it composes with is said in compose.py.
    """

    together: ClassVar[bool] = False
    """Whether members of one group that read one input share something."""

    @abc.abstractmethod
    def __call__(self, weight: Tensor, statistics: Statistics | None = None) -> Made:
        """The spec and its tensors, in order, for `weight` [N, K] of any floating dtype (computed in float32; not
        changed).

        Raises ValueError for a weight that is no finite matrix, and where the method needs statistics and has none.
        """

    @abc.abstractmethod
    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Weight:
        """The Weight that a matrix of `shape` (N, K), of the model's `dtype`, will become."""

    def each(self, members: Iterable[tuple[Tensor, Statistics | None]]) -> Iterator[Made]:
        """What the matrices of one group become, each with its statistics; one after the other, where one does not
        depend on another.
        """
        for weight, statistics in members:
            yield self(weight, statistics)

    def specs(self, shapes: Sequence[Shape], dtype: torch.dtype = torch.bfloat16) -> list[Weight]:
        """The Weights that a group's matrices of these shapes will become."""
        return [self.spec(shape, dtype) for shape in shapes]

    def products(self, shapes: Sequence[Shape]) -> list[Weight]:
        """What the input of a group is multiplied by: the members' Weights, or a factor of all once, then their own."""
        return self.specs(shapes)

    def alone(self) -> Method:
        """The method that does the same to a matrix that is a group of its own."""
        return self

    @abc.abstractmethod
    def __str__(self) -> str: ...

    @property
    def needs_inputs(self) -> bool:
        """Whether it raises where no statistics are given."""
        return False

    @property
    def has_factors(self) -> bool:
        """Whether the result has low-rank factors: costly to find, and no use to a matrix whose rows are looked up."""
        return False

    @property
    def leaves_out(self) -> bool:
        """Whether the result leaves numbers out, by zeros or by a lower rank, which is done for speed: no use where the
        kernel is slower than dense.
        """
        return False

    @property
    def rows_apart(self) -> bool:
        """Whether a row of the result depends on that row of the matrix alone, so that some rows can stand for all."""
        return not self.has_factors

    @staticmethod
    def parse(text: str | Method) -> Method:
        """The method that `text` names, as `parse` of this package."""
        from parco.fitting.methods.text import parse  # here, because it knows all methods, which know this class

        return parse(text)

    def __rshift__(self, then: Method) -> Method:
        from parco.fitting.methods.compose import store

        return store(self, then)

    def __add__(self, other: Method) -> Method:
        from parco.fitting.methods.compose import add

        return add(self, other)


def output_error(
    weight: Tensor, spec: Weight, tensors: tuple[Tensor, ...], statistics: Statistics | None = None
) -> Tensor:
    """Mean squared error of every output, [N] float32, of a stored matrix in place of `weight` [N, K].

    Per token of `statistics`; without them as for inputs of unit variance. Under shifted inputs it is the part above
    what the best dense matrix leaves (the distance to `statistics.target(weight)`).
    """
    target = weight.detach().float()
    if statistics is None or statistics.empty:
        return (target - spec.dense(*tensors)).square_().sum(1)
    return row_error(statistics.target(target) - spec.dense(*tensors), statistics.gram, statistics.count)


def number(value: float) -> str:
    """A number in a method's text, from which `parse` reads the very same one."""
    return repr(float(value)).removesuffix(".0")


def matrix_shape(weight: Tensor) -> Shape:
    return weight.shape[0], weight.shape[1]


def check(weight: Tensor, statistics: Statistics | None, method: Method) -> None:
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"{method}: weight must be a matrix with rows and columns, got shape {tuple(weight.shape)}")
    if not weight.dtype.is_floating_point:
        raise ValueError(f"{method}: weight must be floating point, got {weight.dtype}")
    if not bool(torch.isfinite(weight.detach().sum(dtype=torch.float32))) and not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{method}: weight holds NaN or inf")
    if statistics is not None and statistics.columns != weight.shape[1]:
        raise ValueError(f"{method}: weight has {weight.shape[1]} columns, the statistics have {statistics.columns}")
