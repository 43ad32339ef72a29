"""Linear and Embedding over a stored Weight. Two of them may hold the same `StoredWeight`: that is what tying is.

The forward reads `_modules` and `_parameters` directly: `self.weight` takes the slow path of
`torch.nn.Module.__getattr__`, and in a model of a few million parameters the interpreter's microseconds are a large
part of each token's time.
"""

from __future__ import annotations

from typing import Any

import torch

from parco.nn.shared import multiply
from parco.nn.stored import StoredWeight

_COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Linear(torch.nn.Module):
    """y = x Wᵀ + b with W [out_features, in_features] stored as `weight.spec` says; y has the dtype of x."""

    weight: StoredWeight
    bias: torch.nn.Parameter | None

    def __init__(self, weight: StoredWeight, bias: torch.nn.Parameter | None = None) -> None:
        """Raises ValueError where `bias` does not have one entry per row of the matrix."""
        super().__init__()
        self.out_features, self.in_features = weight.spec.shape
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ValueError(
                f"Linear: bias has the shape {tuple(bias.shape)}; the weight {weight.spec} needs ({self.out_features},)"
            )
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] in fp32, bf16 or fp16; returns [..., out_features]."""
        weight: StoredWeight = self._modules["weight"]  # pyright: ignore[reportAssignmentType]
        if weight._has_basis:  # pyright: ignore[reportPrivateUsage]
            return multiply(weight, x, self._parameters["bias"])
        product = weight._product  # pyright: ignore[reportPrivateUsage]
        return weight.spec.apply(x, *weight.tensors(), bias=self._parameters["bias"], product=product)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Embedding(torch.nn.Module):
    """Rows of W [num_embeddings, embedding_dim], in the weight's compute dtype, times `scale` where one is given.

    `scale` is rounded to the compute dtype before the product, as Gemma's scaled embeddings do. `padding_idx` is kept
    for those who read it; it has no effect, because a row gets no gradient here.
    """

    weight: StoredWeight

    def __init__(self, weight: StoredWeight, padding_idx: int | None = None, scale: float | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.spec.shape
        self.padding_idx = padding_idx
        self.scale = scale
        self.weight = weight
        if scale is not None:
            self._rounded_scale = {
                dtype: torch.tensor(scale, dtype=dtype, device="cpu").item() for dtype in _COMPUTE_DTYPES
            }

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """indices, integers [...]; returns [..., embedding_dim]."""
        weight: StoredWeight = self._modules["weight"]  # pyright: ignore[reportAssignmentType]
        dtype = weight._compute_dtype  # pyright: ignore[reportPrivateUsage]
        rows = weight.spec.lookup(indices, *weight.tensors(), dtype=dtype)
        return rows if self.scale is None else rows * self._rounded_scale[dtype]

    def extra_repr(self) -> str:
        scale = "" if self.scale is None else f", scale={self.scale:g}"
        return f"{self.num_embeddings}, {self.embedding_dim}{scale}"


def kind_of(module: torch.nn.Module) -> type[torch.nn.Module]:
    """The module's class, before `fuse_`, `training.prepare_` or `adapters.add_` gave it a subclass where they did, of
    which fully_shard may have made another. A subclass that somebody else made of theirs is a class of its own.
    """
    kind = type(module)
    sharded = kind.__bases__[0].__name__ == "FSDPModule"
    return (kind.__bases__[-1] if sharded else kind).__dict__.get("_original", kind)


def carries_adapters(module: torch.nn.Module) -> bool:
    """Whether `parco.adapters` computes beside this module."""
    return "adapters" in module._modules  # pyright: ignore[reportPrivateUsage]


def under_its_name(
    original: type[torch.nn.Module], bases: tuple[type, ...], members: dict[str, object]
) -> type[torch.nn.Module]:
    """A class with these bases and members that goes by the name of `original`, and of which `kind_of` knows it."""
    named = {"__module__": original.__module__, "__qualname__": original.__qualname__, "_original": original}
    made: Any = type(original.__name__, bases, named | members)
    return made
