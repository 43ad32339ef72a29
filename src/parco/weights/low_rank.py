"""A matrix stored as the product of two narrower ones. Smaller below rank NK/(N+K), and it multiplies in two steps,
narrow one first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch

from parco.kernels.linear import linear_chain
from parco.products.how import NATIVE, Activations, Product
from parco.weights.weight import Weight


@final
@dataclass(frozen=True)
class LowRank(Weight):
    """W = L R with `left` [N, r] and `right` [r, K], each any Weight; tensors `left.*`, then `right.*`."""

    left: Weight
    right: Weight
    shape: tuple[int, int] = field(init=False, repr=False, compare=False)
    _split: int = field(init=False, repr=False, compare=False)
    _plans: tuple[str | None, str | None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.left.shape[1] != self.right.shape[0]:
            raise ValueError(
                f"LowRank: left is {self.left.shape} and right {self.right.shape}; "
                "left must have as many columns as right has rows (the rank)"
            )
        object.__setattr__(self, "shape", (self.left.shape[0], self.right.shape[1]))
        object.__setattr__(self, "_split", len(self.left.tensors()))
        object.__setattr__(self, "_plans", (self.plan(), self.plan(Activations())))

    @property
    def rank(self) -> int:
        """The inner size r, an upper bound of the matrix's rank."""
        return self.right.shape[0]

    def __str__(self) -> str:
        return f"lowrank({self.left}, {self.right})"

    def parts(self) -> dict[str, Weight]:
        return {"left": self.left, "right": self.right}

    def with_parts(self, *parts: Weight) -> LowRank:
        return LowRank(*parts)

    def products(self) -> tuple[tuple[Weight, ...], ...] | None:
        left, right = self.left.products(), self.right.products()
        if left is None or right is None or len(left) != 1 or len(right) != 1:
            return None
        return (left[0] + right[0],)

    def apply(
        self,
        x: torch.Tensor,
        *tensors: torch.Tensor,
        bias: torch.Tensor | None = None,
        product: Product = NATIVE,
    ) -> torch.Tensor:
        plan = self._plans[isinstance(product, Activations)]
        if plan is not None:
            return linear_chain(x, tensors, bias, plan)
        narrow = self.right.apply(x, *tensors[self._split :], product=product)
        return self.left.apply(narrow, *tensors[: self._split], bias=bias, product=product)

    def dense(self, *tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        left = self.left.dense(*tensors[: self._split], dtype=wide)
        return (left @ self.right.dense(*tensors[self._split :], dtype=wide)).to(dtype)

    def lookup(self, indices: torch.Tensor, *tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        rows = self.left.lookup(indices, *tensors[: self._split], dtype=dtype)
        return rows @ self.right.dense(*tensors[self._split :], dtype=dtype)

    def magnitude(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.left.magnitude(*tensors[: self._split]) @ self.right.magnitude(*tensors[self._split :])

    def tolerance(self, dtype: torch.dtype) -> float:
        # First order in both products: the error of R x passes through L, then L's own is added.
        return self.left.tolerance(dtype) + self.right.tolerance(dtype)
