"""A matrix stored in few bits, with scales: every Format that is not dense."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

import torch

from parco.formats import Format, TensorSpec
from parco.kernels.cast import Rounding, decode_tensors, encode
from parco.kernels.linear import (
    chain,
    embedding_coded,
    is_packed,
    linear_coded,
    linear_coded_int8,
    pack,
    packs,
    takes_int8,
    unpack,
)
from parco.products.how import NATIVE, Activations, Product
from parco.weights.weight import Weight, check_shape, product_tolerance


@final
@dataclass(frozen=True)
class Quantized(Weight):
    """W in `format`, or its name: `Quantized("int4:32", (1024, 4096))`. The tensors are those of `Format.tensors`."""

    format: Format
    shape: tuple[int, int]
    _specs: tuple[tuple[str, TensorSpec], ...] = field(init=False, repr=False, compare=False)
    _name: str = field(init=False, repr=False, compare=False)
    _takes_int8: bool = field(init=False, repr=False, compare=False)

    def __init__(self, format: Format | str, shape: tuple[int, int]) -> None:
        form = Format.parse(format) if isinstance(format, str) else format
        check_shape(shape, "Quantized")
        if form.is_dense:
            raise ValueError(
                f"Quantized: format is {str(form)!r}, which is dense; Dense(shape, {str(form)!r}) stores it"
            )
        if not form.is_named:
            raise ValueError(
                f"Quantized: format is {form!r}, which no name stands for; kernels and files know formats by name"
            )
        object.__setattr__(self, "format", form)
        object.__setattr__(self, "shape", (shape[0], shape[1]))
        object.__setattr__(self, "_specs", tuple(form.tensors(self.shape).items()))
        object.__setattr__(self, "_name", str(form))
        object.__setattr__(self, "_takes_int8", takes_int8(form))

    def __str__(self) -> str:
        return f"quantized({self.format}, {self.shape[0]}x{self.shape[1]})"

    def tensors(self) -> dict[str, TensorSpec]:
        return dict(self._specs)

    def encode(
        self,
        matrix: torch.Tensor,
        *,
        rounding: Rounding = "nearest",
        seed: int = 0,
        scale: torch.Tensor | None = None,
        zero: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The stored tensors for `matrix` [N, K] of any float dtype. `scale` and `zero`, where given, are in the stored
        shape and dtype of `tensors()`; rounding and seed are those of `parco.encode`. Raises ValueError for another
        shape of any of them.
        """
        if tuple(matrix.shape) != self.shape:
            raise ValueError(
                f"Quantized.encode: matrix has the shape {tuple(matrix.shape)}; this Weight stores {self.shape}"
            )
        encoded = encode(matrix.detach(), self.format, rounding=rounding, seed=seed, scale=scale, zero=zero)
        return tuple(encoded.tensors[name] for name, _ in self._specs)

    def pack(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if is_packed(tensors[0]) or not packs(self.format, self.shape):
            return tensors
        return tuple(pack(self.format, self.shape, self._named(tensors)).values())

    def unpack(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not is_packed(tensors[0]):
            return tensors
        return tuple(unpack(self.format, self.shape, self._named(tensors)).values())

    def apply(
        self,
        x: torch.Tensor,
        *tensors: torch.Tensor,
        bias: torch.Tensor | None = None,
        product: Product = NATIVE,
    ) -> torch.Tensor:
        linear = linear_coded_int8 if self._takes_int8 and isinstance(product, Activations) else linear_coded
        return linear(x, *self._arguments(tensors), bias, self._name, self.shape[1], self.shape[0])

    def takes(self, product: Product) -> bool:
        return super().takes(product) or (self._takes_int8 and isinstance(product, Activations))

    def dense(self, *tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return decode_tensors(self.format, self.shape, self._named(self.unpack(*tensors)), dtype)

    def lookup(self, indices: torch.Tensor, *tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        computed = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
        rows, columns = self.shape
        return embedding_coded(indices, *self._arguments(tensors), self._name, columns, computed, rows).to(dtype)

    def magnitude(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.dense(*tensors).abs()

    def factor(self, product: Product) -> chain.Factor:
        return chain.Factor(self._name, *self.shape, self._takes_int8 and isinstance(product, Activations))

    def tolerance(self, dtype: torch.dtype) -> float:
        # Three roundings: of the decoded weight, of the result, and of the input, which the integer kernels write in
        # words relative to its block's largest magnitude (2⁻¹⁵ of it for bf16 and fp16, 2⁻²⁹ for fp32).
        return product_tolerance(self.shape[1], 3, dtype)

    def _named(self, tensors: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        return {name: tensor for (name, _), tensor in zip(self._specs, tensors, strict=True)}

    def _arguments(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, Any, Any, Any]:
        """codes, scale, zero and global_scale as the operations take them, None for those that the format has not."""
        if len(tensors) == 2:
            return (*tensors, None, None)
        named = self._named(tensors)
        return (tensors[0], named.get("scale"), named.get("zero"), named.get("global_scale"))
