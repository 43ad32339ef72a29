"""A matrix stored as another one in rotated coordinates: a random Hadamard transform of the inputs spreads the outliers
of the matrix's rows, and those of x, over their neighbours (QuIP#, arXiv 2402.04396; QuaRot, arXiv 2404.00456).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch

from parco.kernels.cast import turned, turned_back
from parco.kernels.cast.hadamard import blocks
from parco.products.how import NATIVE, Product
from parco.weights.weight import Weight, product_tolerance

_LONGEST = 128
"""Numbers of x that are added up in one of its rotated."""


@final
@dataclass(frozen=True)
class Rotated(Weight):
    """W = inner · Rᵀ with `inner` [N, K] any Weight and R orthogonal, of blocks of 128 neighbours and smaller ones for
    what is left of K, its signs drawn from `seed` (`parco.kernels.cast.turned`); tensors `inner.*`.

    x is rotated when it is multiplied, in fp32, and rounded to its dtype once more.
    """

    inner: Weight
    seed: int = 0
    shape: tuple[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"Rotated: seed is {self.seed}; it must lie in [0, 2**64)")
        object.__setattr__(self, "shape", self.inner.shape)

    def __str__(self) -> str:
        return f"rotated({self.inner}, {self.seed})"

    def parts(self) -> dict[str, Weight]:
        return {"inner": self.inner}

    def with_parts(self, *parts: Weight) -> Rotated:
        return Rotated(*parts, seed=self.seed)

    def inside(self, name: str, matrix: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor | None:
        return turned(matrix.float(), self.seed)

    def apply(
        self,
        x: torch.Tensor,
        *tensors: torch.Tensor,
        bias: torch.Tensor | None = None,
        product: Product = NATIVE,
    ) -> torch.Tensor:
        return self.inner.apply(turned(x, self.seed).to(x.dtype), *tensors, bias=bias, product=product)

    def dense(self, *tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return turned_back(self.inner.dense(*tensors, dtype=wide), self.seed).to(dtype)

    def lookup(self, indices: torch.Tensor, *tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        rows = self.inner.lookup(indices, *tensors, dtype=torch.float32)
        return turned_back(rows, self.seed).to(dtype)

    def magnitude(self, *tensors: torch.Tensor) -> torch.Tensor:
        # Every number of x takes part in all rotated ones of its block, with the weight 1 / sqrt(size).
        inner, parts = self.inner.magnitude(*tensors), list[torch.Tensor]()
        for first, last, size in blocks(self.shape[1]):
            total = inner[:, first:last].unflatten(-1, (-1, size)).sum(-1, keepdim=True) * size**-0.5
            parts.append(total.expand(-1, -1, size).flatten(-2))
        return torch.cat(parts, -1)

    def tolerance(self, dtype: torch.dtype) -> float:
        # First order in both products; that of x with R is as long as a block and rounds its result.
        return self.inner.tolerance(dtype) + product_tolerance(_LONGEST, 1, dtype)
