"""Where the kept numbers of a sparse matrix stand, in plain torch: masks as bits, blocks by their columns.

Kept numbers are stored one after the other, row by row, in the order of their columns. That is a dense matrix, so any
format writes it; a second tensor says where its numbers belong.
"""

import torch
from torch import Tensor

from parco.kernels.cast.packing import pack, unpack


def mask_bytes(columns: int) -> int:
    """Bytes of one row's mask: a bit for each column, lowest first."""
    return -(-columns // 8)


def pack_mask(keep: Tensor) -> Tensor:
    """Bits uint8 [N, ceil(K/8)] of a bool mask [N, K]."""
    return pack(keep.to(torch.uint8), 1)


def unpack_mask(mask: Tensor, columns: int) -> Tensor:
    """The bool mask [N, K] that `pack_mask` packed."""
    return unpack(mask, 1, columns).bool()


def spread_masked(kept: Tensor, mask: Tensor, columns: int) -> Tensor:
    """[N, K] with the numbers `kept` [N, kept] where the bits of `mask` are set and zeros elsewhere."""
    return kept.new_zeros(mask.shape[0], columns).masked_scatter_(unpack_mask(mask, columns), kept)


def index_dtype(columns: int, block: int) -> torch.dtype:
    """The type of a block's column: int16 wherever it suffices."""
    return torch.int16 if -(-columns // block) <= 1 << 15 else torch.int32


def spread_blocks(kept: Tensor, blocks: Tensor, columns: int, block: int) -> Tensor:
    """[N, K] from `kept` [N, kept·block], whose runs of `block` numbers stand in the block columns `blocks` [N, kept]
    of their row, and zeros elsewhere. What would stand past the last column is cut off.
    """
    rows, count = blocks.shape
    wide = kept.new_zeros(rows, -(-columns // block), block)
    at = blocks.to(torch.int64)[:, :, None].expand(rows, count, block)
    return wide.scatter_(1, at, kept.reshape(rows, count, block)).flatten(1)[:, :columns]


def of_bands(blocks: Tensor, rows: Tensor, block: int) -> Tensor:
    """`blocks` [bands, kept] of the bands in which `rows` lie."""
    return blocks.index_select(0, torch.div(rows, block, rounding_mode="floor"))
