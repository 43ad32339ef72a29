"""A matrix of which only some square blocks are stored, as many in every band of rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from parco.formats import Format, TensorSpec
from parco.kernels.sparse import index_dtype, linear_blocks, of_bands, spread_blocks
from parco.products.how import NATIVE, Product
from parco.weights.dense import Dense
from parco.weights.quantized import Quantized
from parco.weights.sparse import Sparse, largest
from parco.weights.weight import check_shape

BLOCKS = (16, 32, 64)
"""Sizes of a block's side."""


@final
@dataclass(frozen=True)
class BlockSparse(Sparse):
    """`kept` blocks of `block` x `block` in every band of `block` rows, their numbers in `format`, any that a name
    stands for: `BlockSparse("bf16", (1024, 4096), 32, 64)`. Tensors: those of `format` for the matrix [N, kept·block]
    of which each row is its part of the band's blocks, and `blocks` [ceil(N/block), kept], the blocks' columns,
    ascending, in units of blocks: int16, or int32 for matrices of more than 2¹⁵ of them. The last band and the last
    block column may be short.
    """

    format: Format
    shape: tuple[int, int]
    block: int
    kept: int
    _kept: Dense | Quantized = field(init=False, repr=False, compare=False)
    _specs: tuple[tuple[str, TensorSpec], ...] = field(init=False, repr=False, compare=False)
    _name: str = field(init=False, repr=False, compare=False)

    def __init__(self, format: Format | str, shape: tuple[int, int], block: int, kept: int) -> None:
        check_shape(shape, "BlockSparse")
        if block not in BLOCKS:
            raise ValueError(f"BlockSparse: block is {block}; its side is one of {', '.join(map(str, BLOCKS))}")
        bands, across = -(-shape[0] // block), -(-shape[1] // block)
        if not 1 <= kept <= across:
            raise ValueError(f"BlockSparse: kept is {kept}; a band of {across} blocks keeps 1 to {across}")
        object.__setattr__(self, "block", block)
        object.__setattr__(self, "kept", kept)
        where = TensorSpec((bands, kept), index_dtype(shape[1], block))
        self._settle(format, shape, kept * block, ("blocks", where))

    def __str__(self) -> str:
        return f"blocksparse({self.format}, {self.shape[0]}x{self.shape[1]}, {self.block}, {self.kept})"

    def apply(self, x: Tensor, *tensors: Tensor, bias: Tensor | None = None, product: Product = NATIVE) -> Tensor:
        return linear_blocks(x, *self._arguments(tensors), bias, self._name, self.shape[1], self.block)

    def keep(self, scores: Tensor) -> Tensor:
        """As `Sparse.keep`, by the sum of each block's scores."""
        self._check("keep", "scores", scores)
        rows, columns = self.shape
        padded = torch.nn.functional.pad(scores.double(), (0, -columns % self.block, 0, -rows % self.block))
        sums = padded.unflatten(1, (-1, self.block)).unflatten(0, (-1, self.block)).sum((1, 3))
        kept = largest(sums, self.kept)
        return kept.repeat_interleave(self.block, 0)[:rows].repeat_interleave(self.block, 1)[:, :columns]

    def _excess(self, lost: Tensor, nonzero: Tensor) -> str:
        first = int(lost.nonzero()[0, 0]) // self.block * self.block
        band = nonzero[first : first + self.block]
        found = sum(int(block.any()) for block in band.split(self.block, 1))
        return (
            f"rows {first} to {first + len(band) - 1} have {found} blocks with non-zeros and this Weight keeps "
            f"{self.kept} of each band"
        )

    def _gather(self, matrix: Tensor, keep: Tensor) -> Tensor:
        rows, columns = self.shape
        runs = torch.nn.functional.pad(matrix, (0, -columns % self.block)).unflatten(1, (-1, self.block))
        at = of_bands(self._columns(keep), torch.arange(rows, device=matrix.device), self.block)
        return runs.take_along_dim(at[:, :, None], 1).reshape(rows, -1)

    def _place(self, keep: Tensor) -> Tensor:
        return self._columns(keep).to(self._specs[-1][1].dtype)

    def _columns(self, keep: Tensor) -> Tensor:
        """The kept blocks' columns [bands, kept] of a mask that takes or leaves whole blocks."""
        return keep[:: self.block, :: self.block].nonzero()[:, 1].reshape(-1, self.kept)

    def _spread(self, kept: Tensor, rows: Tensor | None, where: Tensor) -> Tensor:
        rows = torch.arange(self.shape[0], device=kept.device) if rows is None else rows
        return spread_blocks(kept, of_bands(where, rows, self.block), self.shape[1], self.block)
