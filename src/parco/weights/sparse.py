"""What sparse Weights have in common: the kept numbers of a matrix in a format, and where they stand.

Every row keeps as many numbers as every other, so that the shapes of all tensors follow from the spec alone and work
divides evenly among threads. The kept numbers, row by row in the order of their columns, are a dense matrix [N, kept],
which any format writes: `Bitmap("int8:row", …)` is half the bytes of int8 at half the numbers, but for one bit each.

Further laws, of every Weight here: `keep(scores)` is a mask that the Weight can store; `encode` of a matrix within such
a mask loses no more than the format does, and what the mask leaves out decodes to exactly zero.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor

from parco.formats import Format, TensorSpec
from parco.kernels.sparse import linear_masked, mask_bytes, pack_mask, spread_masked
from parco.products.how import NATIVE, Product
from parco.weights.dense import Dense
from parco.weights.quantized import Quantized
from parco.weights.weight import Weight, product_tolerance


class Sparse(Weight):
    """A matrix of which only some numbers are stored: `_kept` is the Weight of the dense matrix that they make, and
    `_where` the tensor that says where they stand.
    """

    format: Format
    _kept: Dense | Quantized
    _specs: tuple[tuple[str, TensorSpec], ...]
    _name: str

    def _settle(self, format: Format | str, shape: tuple[int, int], kept: int, where: tuple[str, TensorSpec]) -> None:
        """Sets what every sparse Weight has, for rows that keep `kept` numbers each."""
        form = Format.parse(format) if isinstance(format, str) else format
        stored = Dense((shape[0], kept), form) if form.is_dense else Quantized(form, (shape[0], kept))
        object.__setattr__(self, "format", form)
        object.__setattr__(self, "shape", (shape[0], shape[1]))
        object.__setattr__(self, "_kept", stored)
        object.__setattr__(self, "_name", str(form))
        object.__setattr__(self, "_specs", (*stored.tensors().items(), where))

    def tensors(self) -> dict[str, TensorSpec]:
        return dict(self._specs)

    @abc.abstractmethod
    def keep(self, scores: Tensor) -> Tensor:
        """The bool mask [N, K] of numbers that this Weight stores when those of the largest `scores` [N, K] are to
        stay; of equal ones the first. ValueError for another shape.
        """

    @abc.abstractmethod
    def _excess(self, lost: Tensor, nonzero: Tensor) -> str:
        """Which part of the matrix has how many non-zeros too many, where `lost` [N, K] are those without a place."""

    @abc.abstractmethod
    def _gather(self, matrix: Tensor, keep: Tensor) -> Tensor:
        """The numbers [N, kept] of `matrix` that the mask `keep` takes."""

    @abc.abstractmethod
    def _place(self, keep: Tensor) -> Tensor:
        """The stored tensor that stands for the mask `keep`."""

    @abc.abstractmethod
    def _spread(self, kept: Tensor, rows: Tensor | None, where: Tensor) -> Tensor:
        """The rows `rows` (all where None) of the matrix from their kept numbers."""

    def encode(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """The stored tensors for `matrix` [N, K] of any float dtype, its kept numbers rounded to nearest. Rows with
        fewer non-zeros than are kept get zeros that are. Raises ValueError for another shape, and for more non-zeros
        than fit, saying how many.
        """
        self._check("encode", "matrix", matrix)
        matrix = matrix.detach()
        nonzero = matrix != 0
        keep = self.keep(nonzero.to(torch.uint8))
        lost = nonzero & ~keep
        if lost.any():
            raise ValueError(
                f"{type(self).__name__}.encode: {self._excess(lost, nonzero)}; {int(lost.sum())} of the matrix's "
                f"{int(nonzero.sum())} non-zeros have no place. keep(scores) says which to leave"
            )
        return (*self._kept.encode(self._gather(matrix, keep)), self._place(keep))

    def dense(self, *tensors: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._spread(self._kept.dense(*tensors[:-1], dtype=dtype), None, tensors[-1])

    def lookup(self, indices: Tensor, *tensors: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        rows = indices.reshape(-1)
        kept = self._kept.lookup(rows, *tensors[:-1], dtype=dtype)
        return self._spread(kept, rows, tensors[-1]).reshape(*indices.shape, self.shape[1])

    def magnitude(self, *tensors: Tensor) -> Tensor:
        return self.dense(*tensors).abs()

    def tolerance(self, dtype: torch.dtype) -> float:
        # As Quantized: roundings of the decoded weight, of the result, and of an input written in words.
        return product_tolerance(self.shape[1], 3, dtype)

    def _arguments(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Any, Any, Any, Tensor]:
        """values or codes, scale, zero, global_scale and what says where, as the operations take them."""
        named = {name: tensor for (name, _), tensor in zip(self._specs, tensors, strict=True)}
        return (tensors[0], named.get("scale"), named.get("zero"), named.get("global_scale"), tensors[-1])

    def _check(self, method: str, argument: str, tensor: Tensor) -> None:
        if tuple(tensor.shape) != self.shape:
            raise ValueError(
                f"{type(self).__name__}.{method}: {argument} has the shape {tuple(tensor.shape)}; this Weight stores "
                f"{self.shape}"
            )


def largest(scores: Tensor, count: int) -> Tensor:
    """The bool mask of the `count` largest along the last dimension, of equal ones the first."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(-1, order, True)


class Masked(Sparse):
    """A sparse Weight whose numbers may stand anywhere in a row: its last tensor, `mask`, has a bit for every number of
    the matrix.
    """

    def _settle_masked(self, format: Format | str, shape: tuple[int, int], kept: int) -> None:
        mask = TensorSpec((shape[0], mask_bytes(shape[1])), torch.uint8)
        self._settle(format, shape, kept, ("mask", mask))

    def apply(self, x: Tensor, *tensors: Tensor, bias: Tensor | None = None, product: Product = NATIVE) -> Tensor:
        return linear_masked(x, *self._arguments(tensors), bias, self._name, self.shape[1], self._kept.shape[1])

    def _gather(self, matrix: Tensor, keep: Tensor) -> Tensor:
        return matrix.masked_select(keep).reshape(self._kept.shape)

    def _place(self, keep: Tensor) -> Tensor:
        return pack_mask(keep)

    def _spread(self, kept: Tensor, rows: Tensor | None, where: Tensor) -> Tensor:
        return spread_masked(kept, where if rows is None else where.index_select(0, rows), self.shape[1])
