"""A matrix stored as a sum of Weights: a quantized matrix and its low-rank correction, or a frozen matrix and its LoRA
factors.
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
class Sum(Weight):
    """W = A + B + …, two or more Weights of one shape; tensors `0.*`, `1.*`, …"""

    terms: tuple[Weight, ...]
    shape: tuple[int, int] = field(init=False, repr=False, compare=False)
    _slices: tuple[slice, ...] = field(init=False, repr=False, compare=False)
    _plans: tuple[str | None, str | None] = field(init=False, repr=False, compare=False)

    def __init__(self, *terms: Weight) -> None:
        if len(terms) < 2 or any(term.shape != terms[0].shape for term in terms):
            raise ValueError(
                f"Sum: terms have the shapes {[term.shape for term in terms]}; two or more terms of one shape add up"
            )
        object.__setattr__(self, "terms", terms)
        object.__setattr__(self, "shape", terms[0].shape)
        slices: list[slice] = []
        start = 0
        for term in terms:
            slices.append(slice(start, start + len(term.tensors())))
            start = slices[-1].stop
        object.__setattr__(self, "_slices", tuple(slices))
        object.__setattr__(self, "_plans", (self.plan(), self.plan(Activations())))

    def __str__(self) -> str:
        return f"sum({', '.join(str(term) for term in self.terms)})"

    def parts(self) -> dict[str, Weight]:
        return {str(index): term for index, term in enumerate(self.terms)}

    def with_parts(self, *parts: Weight) -> Sum:
        return Sum(*parts)

    def products(self) -> tuple[tuple[Weight, ...], ...] | None:
        found: tuple[tuple[Weight, ...], ...] = ()
        for term in self.terms:
            own = term.products()
            if own is None:
                return None
            found += own
        return found

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
        total = self.terms[0].apply(x, *tensors[self._slices[0]], bias=bias, product=product)
        for term, part in zip(self.terms[1:], self._slices[1:], strict=True):
            total = total + term.apply(x, *tensors[part], product=product)
        return total

    def dense(self, *tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        total = self.terms[0].dense(*tensors[self._slices[0]], dtype=wide)
        for term, part in zip(self.terms[1:], self._slices[1:], strict=True):
            total = total + term.dense(*tensors[part], dtype=wide)
        return total.to(dtype)

    def lookup(self, indices: torch.Tensor, *tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        total = self.terms[0].lookup(indices, *tensors[self._slices[0]], dtype=dtype)
        for term, part in zip(self.terms[1:], self._slices[1:], strict=True):
            total = total + term.lookup(indices, *tensors[part], dtype=dtype)
        return total

    def magnitude(self, *tensors: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(self.shape, device=tensors[0].device)
        for term, part in zip(self.terms, self._slices, strict=True):
            total += term.magnitude(*tensors[part])
        return total

    def tolerance(self, dtype: torch.dtype) -> float:
        # Each addition rounds the running sum, which is at most |x| magnitudeᵀ, once more.
        return max(term.tolerance(dtype) for term in self.terms) + (len(self.terms) - 1) * torch.finfo(dtype).eps / 2.0
