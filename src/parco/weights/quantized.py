"""A matrix stored in few bits, with scales: every Format that is not dense.

Integers scaled by groups along a row, by row, or as a whole run on the compiled kernels of `parco.kernels.linear`.
Every other format runs by definition: decode, then multiply. Which one a Weight takes is decided from its format when
it is made, never per call.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch

from parco.formats import TENSOR, Format, TensorSpec
from parco.kernels.cast import Rounding, decode_tensors, encode
from parco.kernels.linear import embedding_int, linear_int
from parco.weights.weight import Weight, check_shape, product_tolerance


@final
@dataclass(frozen=True)
class Quantized(Weight):
    """W in `format`, or its name: `Quantized("int4:32", (1024, 4096))`. The tensors are those of `Format.tensors`."""

    format: Format
    shape: tuple[int, int]
    _specs: tuple[tuple[str, TensorSpec], ...] = field(init=False, repr=False, compare=False)
    _integer: tuple[int, int, int] | None = field(init=False, repr=False, compare=False)

    def __init__(self, format: Format | str, shape: tuple[int, int]) -> None:
        form = Format.parse(format) if isinstance(format, str) else format
        check_shape(shape, "Quantized")
        if form.is_dense:
            raise ValueError(
                f"Quantized: format is {str(form)!r}, which is dense; Dense(shape, {str(form)!r}) stores it"
            )
        object.__setattr__(self, "format", form)
        object.__setattr__(self, "shape", (shape[0], shape[1]))
        object.__setattr__(self, "_specs", tuple(form.tensors(self.shape).items()))
        object.__setattr__(self, "_integer", _integer_arguments(form, shape[1]))

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

    def apply(self, x: torch.Tensor, *tensors: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self._integer is not None:
            bits, group, columns = self._integer
            zero = tensors[2] if len(tensors) == 3 else None
            return linear_int(x, tensors[0], tensors[1], zero, bias, bits, group, columns)
        return torch.nn.functional.linear(x, self.dense(*tensors, dtype=x.dtype), bias)

    def dense(self, *tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return decode_tensors(self.format, self.shape, self._named(tensors), dtype)

    def lookup(self, indices: torch.Tensor, *tensors: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if self._integer is not None:
            bits, group, columns = self._integer
            zero = tensors[2] if len(tensors) == 3 else None
            return embedding_int(indices, tensors[0], tensors[1], zero, bits, group, columns, dtype)
        block_rows = self.format.block.rows
        if block_rows not in (1, None):
            # Rows share scales with their neighbours, so all are decoded; such formats are made for products.
            return torch.nn.functional.embedding(indices, self.dense(*tensors, dtype=dtype))
        rows = indices.reshape(-1)
        per_row = ("codes", "scale", "zero") if block_rows == 1 else ("codes",)
        taken = {
            name: tensor.index_select(0, rows) if name in per_row else tensor
            for name, tensor in self._named(tensors).items()
        }
        decoded = decode_tensors(self.format, (rows.numel(), self.shape[1]), taken, dtype)
        return decoded.reshape(*indices.shape, self.shape[1])

    def magnitude(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.dense(*tensors).abs()

    def tolerance(self, dtype: torch.dtype) -> float:
        # Three roundings: of the decoded weight, of the result, and of the input, which the integer kernels write in
        # words relative to its block's largest magnitude (2⁻¹⁵ of it for bf16 and fp16, 2⁻²⁹ for fp32).
        return product_tolerance(self.shape[1], 3, dtype)

    def _named(self, tensors: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        return {name: tensor for (name, _), tensor in zip(self._specs, tensors, strict=True)}


def _integer_arguments(form: Format, columns: int) -> tuple[int, int, int] | None:
    """(bits, group, columns) of the integer kernels where they cover `form`: integers scaled along a row, or symmetric
    ones under one scale for all, in groups of a multiple of 16. None elsewhere.
    """
    covered = form.block.rows == 1 or (form.block == TENSOR and not form.is_asymmetric)
    if not form.is_plain_integer or not covered:
        return None
    group = min(form.block.columns or columns, columns)
    if group < columns and group % 16:
        return None
    return form.bits, group, columns
