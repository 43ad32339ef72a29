"""A matrix stored as it is, in fp32, bf16 or fp16. It is the only Weight whose tensors train."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, final

import torch

from parco.formats import Format, TensorSpec
from parco.kernels.linear import chain, linear_dense
from parco.products.how import NATIVE, Product
from parco.weights.weight import Weight, check_shape, product_tolerance


@final
@dataclass(frozen=True)
class Dense(Weight):
    """W itself, one tensor `values` [N, K]. `format` is one of the dense formats, or its name: `Dense((1024, 4096),
    "bf16")`.
    """

    trains: ClassVar[bool] = True

    shape: tuple[int, int]
    format: Format
    _dtype: torch.dtype = field(init=False, repr=False, compare=False)

    def __init__(self, shape: tuple[int, int], format: Format | str = "fp32") -> None:
        form = Format.parse(format) if isinstance(format, str) else format
        check_shape(shape, "Dense")
        if not form.is_dense:
            raise ValueError(
                f"Dense: format is {str(form)!r}; a dense matrix is fp32, bf16 or fp16, "
                "and Quantized holds the other formats"
            )
        object.__setattr__(self, "shape", (shape[0], shape[1]))
        object.__setattr__(self, "format", form)
        (values,) = form.tensors(self.shape).values()
        object.__setattr__(self, "_dtype", values.dtype)

    def __str__(self) -> str:
        return f"dense({self.format}, {self.shape[0]}x{self.shape[1]})"

    def tensors(self) -> dict[str, TensorSpec]:
        return {"values": TensorSpec(self.shape, self._dtype)}

    def encode(self, matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The stored tensors for `matrix` [N, K] of any float dtype, rounded to nearest even. Always a copy of its
        own. Raises ValueError for another shape.
        """
        if tuple(matrix.shape) != self.shape:
            raise ValueError(
                f"Dense.encode: matrix has the shape {tuple(matrix.shape)}; this Weight stores {self.shape}"
            )
        return (matrix.detach().to(self._dtype, copy=True, memory_format=torch.contiguous_format),)

    def apply(
        self,
        x: torch.Tensor,
        *tensors: torch.Tensor,
        bias: torch.Tensor | None = None,
        product: Product = NATIVE,
    ) -> torch.Tensor:
        (values,) = tensors
        return linear_dense(x, values, bias)

    def dense(self, *tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        (values,) = tensors
        return values.to(dtype)

    def lookup(self, indices: torch.Tensor, *tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        (values,) = tensors
        return torch.nn.functional.embedding(indices, values).to(dtype)

    def magnitude(self, *tensors: torch.Tensor) -> torch.Tensor:
        (values,) = tensors
        return values.float().abs()

    def factor(self, product: Product) -> chain.Factor:
        return chain.Factor(str(self.format), *self.shape)

    def tolerance(self, dtype: torch.dtype) -> float:
        # Two roundings: of the weight where it is stored wider than x, and of the result.
        return product_tolerance(self.shape[1], 2, dtype)
