"""A matrix stored as another one whose columns were scaled before it was: what AWQ and SmoothQuant do, so that the
columns of large inputs err less, or large inputs become small.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch

from parco.products.how import NATIVE, Product
from parco.weights.dense import Dense
from parco.weights.weight import Weight


@final
@dataclass(frozen=True)
class Scaled(Weight):
    """W = inner · diag(scale) with `inner` [N, K] any Weight and `scale` a Dense [1, K]; tensors `inner.*`, then
    `scale.values`.

    The scale is what x is multiplied by, the reciprocal of what the columns of W were multiplied by before they were
    stored, so that no product divides. x is rounded to its dtype once more.
    """

    inner: Weight
    scale: Dense
    shape: tuple[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        wanted = (1, self.inner.shape[1])
        if not isinstance(self.scale, Dense) or self.scale.shape != wanted:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"Scaled: scale is {self.scale}; {self.inner} takes a Dense with one number for each column, {wanted}"
            )
        object.__setattr__(self, "shape", self.inner.shape)

    def __str__(self) -> str:
        return f"scaled({self.inner}, {self.scale})"

    def parts(self) -> dict[str, Weight]:
        return {"inner": self.inner, "scale": self.scale}

    def with_parts(self, *parts: Weight) -> Scaled:
        inner, scale = parts
        assert isinstance(scale, Dense)
        return Scaled(inner, scale)

    def inside(self, name: str, matrix: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor | None:
        return matrix.float() / tensors[-1].float() if name == "inner" else None

    def apply(
        self,
        x: torch.Tensor,
        *tensors: torch.Tensor,
        bias: torch.Tensor | None = None,
        product: Product = NATIVE,
    ) -> torch.Tensor:
        *inner, scale = tensors
        return self.inner.apply((x * scale[0]).to(x.dtype), *inner, bias=bias, product=product)

    def dense(self, *tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        *inner, scale = tensors
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (self.inner.dense(*inner, dtype=wide) * scale).to(dtype)

    def lookup(self, indices: torch.Tensor, *tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        *inner, scale = tensors
        return (self.inner.lookup(indices, *inner, dtype=torch.float32) * scale[0]).to(dtype)

    def magnitude(self, *tensors: torch.Tensor) -> torch.Tensor:
        *inner, scale = tensors
        return self.inner.magnitude(*inner) * scale.abs()

    def tolerance(self, dtype: torch.dtype) -> float:
        # One more rounding, of x times the scale; first order.
        return self.inner.tolerance(dtype) + torch.finfo(dtype).eps / 2.0
