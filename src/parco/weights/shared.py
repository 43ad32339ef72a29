"""A factor that several layers hold: q, k and v as U₁R, U₂R and U₃R with one R, whose product with x serves all.

Which layers share is not said here: a Weight describes one matrix. The layers' modules hold the same tensors, as tied
embeddings do (`parco.nn.shared`), and what counts, saves or sums up tensors takes them once. The mark in the text tells
a reader of one layer that its bytes are not its own, and a loader that this part belongs to others as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import final

import torch

from parco.products.how import NATIVE, Product
from parco.weights.weight import Weight


@final
@dataclass(frozen=True)
class Shared(Weight):
    """W = `basis`, any Weight, held by several layers; tensors `basis.*`. `nbytes` are those of the tensors, which each
    of the layers has.
    """

    basis: Weight
    shape: tuple[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.basis.shape)

    def __str__(self) -> str:
        return f"shared({self.basis})"

    def parts(self) -> dict[str, Weight]:
        return {"basis": self.basis}

    def with_parts(self, *parts: Weight) -> Shared:
        return Shared(*parts)

    def products(self) -> tuple[tuple[Weight, ...], ...] | None:
        return self.basis.products()

    def apply(
        self,
        x: torch.Tensor,
        *tensors: torch.Tensor,
        bias: torch.Tensor | None = None,
        product: Product = NATIVE,
    ) -> torch.Tensor:
        return self.basis.apply(x, *tensors, bias=bias, product=product)

    def dense(self, *tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.basis.dense(*tensors, dtype=dtype)

    def lookup(self, indices: torch.Tensor, *tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.basis.lookup(indices, *tensors, dtype=dtype)

    def magnitude(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.basis.magnitude(*tensors)

    def tolerance(self, dtype: torch.dtype) -> float:
        return self.basis.tolerance(dtype)


def shared_parts(spec: Weight) -> Iterator[tuple[str, Shared]]:
    """The outermost parts of `spec` that are Shared, by their dotted names: `right`."""
    for name, part in spec.parts().items():
        if isinstance(part, Shared):
            yield name, part
        else:
            yield from ((f"{name}.{inner}", found) for inner, found in shared_parts(part))


def shared_tensors(spec: Weight) -> set[str]:
    """The names among `spec.tensors()` of what other layers hold too."""
    paths = tuple(f"{path}." for path, _ in shared_parts(spec))
    return {name for name in spec.tensors() if name.startswith(paths)}
