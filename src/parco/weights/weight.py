"""What it means to be a Weight: how one matrix W [N, K] is stored, apart from the numbers themselves.

A Weight is a *specification*. It holds static data only (shapes, formats, and the Weights that it is made of), so it
can be hashed, compared, printed, parsed back and asked for the tensors that it needs without one number being in
memory. The tensors belong to a module (`parco.nn.StoredWeight`), which passes them back in for every computation. The
alternative, a tensor subclass that carries its own storage, was rejected: `state_dict`, safetensors, FSDP2 and
`torch.compile` then each need a special case.

The laws, which `tests/laws/weight_laws.py` checks for every Weight:

- `w.apply(x, *t)` equals `x @ w.dense(*t).T` in every entry within `w.tolerance(x.dtype) * (|x| @ w.magnitude(*t).T)`;
- `w.lookup(i, *t)` equals `w.dense(*t)[i]`;
- `w.nbytes` equals the bytes of the tensors;
- `weights.parse(str(w)) == w`;
- `w.pack(*t)` stands for the same matrix, multiplies to the same bits, and `w.unpack` undoes it;
- `w.apply(x, *t, product=p)` of one that is not composed and `takes(p)` equals `matmul(x, w.dense(*t).T, p)`;
- `w.apply` differentiates with respect to x, as `x @ w.dense(*t).T` does.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import ClassVar

import torch

from parco.formats import TensorSpec
from parco.kernels.linear import chain
from parco.products.how import NATIVE, Native, Product

UNIT_FP32 = 2.0**-24
"""Unit roundoff of fp32, in which every product here is accumulated."""


class Weight(abc.ABC):
    """How a matrix of `shape` (N, K) is stored. Subclasses are final frozen dataclasses; tensors are passed in the
    order of `tensors()`.
    """

    shape: tuple[int, int]

    trains: ClassVar[bool] = False
    """Whether the tensors of this very Weight (not of its parts) may receive gradients. Only `Dense` says yes."""

    def parts(self) -> dict[str, Weight]:
        """The Weights that this one is made of, by name and in order; empty for one that holds tensors itself.

        A Weight with parts holds no tensors besides theirs: a vector of its own is a part `Dense((1, K))`.
        """
        return {}

    def with_parts(self, *parts: Weight) -> Weight:
        """The same composite of other Weights of the same shapes, in the order of `parts()`."""
        raise TypeError(f"{self} is made of no other Weights")

    def inside(self, name: str, matrix: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor | None:
        """What the part `name` stands for, fp32, where this Weight stands for `matrix` [N, K] and the other parts are
        as in `tensors`; None where the others share in the matrix.
        """
        return None

    def encode(self, matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The stored tensors for `matrix` [N, K], rounded to nearest. Raises TypeError for a composite: a method of
        `parco.fitting` says what each part gets. ValueError for another shape.
        """
        raise TypeError(f"{self} is made of parts, and how a matrix is shared among them is a method's choice")

    def tensors(self) -> dict[str, TensorSpec]:
        """Name, shape and dtype of every stored tensor, in the order in which the other methods take them. Those of
        parts are prefixed by the parts' names: `left.codes`. A Weight without parts says its own.
        """
        return {f"{name}.{leaf}": spec for name, part in self.parts().items() for leaf, spec in part.tensors().items()}

    def pack(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors in the layout that the CPU's kernels read fastest: other shapes, the same bytes but for rows that
        fill a panel, and digits, which become bits. All that takes `tensors` here takes packed ones too. What gains
        nothing stays as it is.
        """
        return self._of_parts(lambda part, own: part.pack(*own), tensors)

    def unpack(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Packed tensors as `tensors()` describes them."""
        return self._of_parts(lambda part, own: part.unpack(*own), tensors)

    def _of_parts(
        self,
        change: Callable[[Weight, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]],
        tensors: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, ...]:
        """The tensors after `change(part, its tensors)` of every part."""
        parts = self.parts()
        if not parts:
            return tensors
        found: tuple[torch.Tensor, ...] = ()
        for part in parts.values():
            found += change(part, tensors[len(found) : len(found) + len(part.tensors())])
        return found

    @abc.abstractmethod
    def apply(
        self,
        x: torch.Tensor,
        *tensors: torch.Tensor,
        bias: torch.Tensor | None = None,
        product: Product = NATIVE,
    ) -> torch.Tensor:
        """x Wᵀ + bias for x [..., K] in fp32, bf16 or fp16; returns [..., N] in the dtype of x. Products accumulate in
        fp32. Every part that `takes` the Product computes by it, the others as they always do.
        """

    def takes(self, product: Product) -> bool:
        """Whether this Weight, or any part of it, computes by `product`."""
        return isinstance(product, Native) or any(part.takes(product) for part in self.parts().values())

    @abc.abstractmethod
    def dense(self, *tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix that the tensors stand for, [N, K] in `dtype`."""

    @abc.abstractmethod
    def lookup(self, indices: torch.Tensor, *tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The rows `indices` (integers, any shape [...]) of the matrix: [..., K] in `dtype`. Other rows are decoded
        only where rows share a scale. Raises IndexError for an index that is no row.
        """

    @abc.abstractmethod
    def magnitude(self, *tensors: torch.Tensor) -> torch.Tensor:
        """fp32 [N, K], at least |W| entry by entry: the sizes of what is added up, which is what rounding errors scale
        with.
        """

    @abc.abstractmethod
    def tolerance(self, dtype: torch.dtype) -> float:
        """The largest error of `apply` on x of `dtype`, as a multiple of |x| magnitudeᵀ."""

    def products(self) -> tuple[tuple[Weight, ...], ...] | None:
        """The matrix as a sum of products of Weights without parts, whose tensors one after the other are this one's;
        None where it is no such sum.
        """
        return None if self.parts() else ((self,),)

    def plan(self, product: Product = NATIVE) -> str | None:
        """The text by which `parco.kernels.linear.linear_chain` multiplies by the tensors; None where it cannot."""
        terms = [[leaf.factor(product) for leaf in term] for term in self.products() or ()]
        known = [[factor for factor in term if factor is not None] for term in terms]
        return chain.text(known) if terms and terms == known else None

    def factor(self, product: Product) -> chain.Factor | None:
        """This Weight as a factor of a plan; None for one with parts, or that `linear_chain` does not take."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(spec.nbytes for spec in self.tensors().values())


def check_shape(shape: tuple[int, int], owner: str) -> None:
    """Raises ValueError unless `shape` is two positive whole numbers."""
    if len(shape) != 2 or not all(isinstance(size, int) and size > 0 for size in shape):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"{owner}: shape is {shape!r}; a matrix has two positive whole sizes (N, K)")


def product_tolerance(columns: int, roundings: int, dtype: torch.dtype) -> float:
    """Error bound of a product of length `columns` with `roundings` further roundings to `dtype`, as a multiple of |x|
    |W|ᵀ.

    Accumulating K terms in fp32 costs at most λ√K·u with high probability (Higham and Mary, SIAM J. Sci. Comput. 41(5),
    2019, where the certain bound is K·u); λ = 2 here. Every rounding to `dtype` adds that dtype's unit roundoff.
    """
    return 2.0 * math.sqrt(columns) * UNIT_FP32 + roundings * torch.finfo(dtype).eps / 2.0
