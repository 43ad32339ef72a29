"""Tiles: a matrix cut into the blocks of a format, and reductions over each.

A matrix is walked in chunks of whole rows of blocks of about a quarter of a million elements, so that temporaries
stay in cache and small beside the matrix. The walk depends on the shape alone and sums are added in a fixed order:
results do not depend on threads.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from parco.formats import Block
from parco.kernels.cast.amax import row_amax

CHUNK_ELEMENTS = 1 << 18


def row_chunks(shape: tuple[int, int], block: Block) -> Iterator[range]:
    """Ranges of rows that cover a matrix of `shape`, each a whole number of blocks high (if blocks are of finite
    height).
    """
    rows, columns = shape
    height = block.rows or 1
    step = max(1, CHUNK_ELEMENTS // max(1, columns * height)) * height
    for start in range(0, rows, step):
        yield range(start, min(start + step, rows))


def scale_rows(chunk: range, block: Block) -> slice:
    """The rows of a format's scales that belong to the matrix rows of `chunk`."""
    if block.rows is None:
        return slice(0, 1)
    return slice(chunk.start // block.rows, -(-chunk.stop // block.rows))


def tile(x: Tensor, block: Block) -> Tensor:
    """[n, K] -> [R, r, C, c]: R x C blocks of r x c elements, filled up with zeros at the lower and right edge."""
    rows, columns = x.shape
    height, width = block.rows or max(rows, 1), block.columns or max(columns, 1)
    below, beside = -rows % height, -columns % width
    if below or beside:
        x = torch.nn.functional.pad(x, (0, beside, 0, below))
    return x.reshape((rows + below) // height, height, (columns + beside) // width, width)


def untile(tiles: Tensor, shape: tuple[int, int]) -> Tensor:
    """What `tile` cut, put together again: [R, r, C, c] -> [n, K]."""
    down, height, across, width = tiles.shape
    return tiles.reshape(down * height, across * width)[: shape[0], : shape[1]]


def spread(scale: Tensor) -> Tensor:
    """[R, C] -> [R, 1, C, 1], which broadcasts over tiles."""
    return scale[:, None, :, None]


def _reduce(
    x: Tensor, block: Block, within: Callable[[Tensor], Tensor], between: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """[N, K] -> one number per block. `within` reduces the tiles of a chunk; `between` joins chunks of an endless
    block.
    """
    shape = (x.shape[0], x.shape[1])
    parts = [within(tile(x[chunk.start : chunk.stop].to(torch.float32), block)) for chunk in row_chunks(shape, block)]
    if not parts:
        return torch.zeros(block.counts(shape), dtype=torch.float32, device=x.device)
    if block.rows is not None:
        return torch.cat(parts)
    total = parts[0]
    for part in parts[1:]:
        total = between(total, part)
    return total


def _amax(tiles: Tensor) -> Tensor:
    if tiles.numel() == 0:
        return tiles.new_zeros(tiles.shape[0], tiles.shape[2])
    return tiles.amax(dim=(1, 3))


def block_amax(x: Tensor, block: Block) -> Tensor:
    """Greatest magnitude of each block, fp32 [R, C]; NaN where the block has a NaN, 0 where it is empty."""
    rows, columns = x.shape
    if rows == 0 or block.columns == 1:
        return _reduce(x, block, lambda tiles: _amax(tiles.abs()), torch.maximum)
    amax = row_amax(x, block.columns or columns)
    if block.rows == 1:
        return amax
    height = block.rows or rows
    return torch.nn.functional.pad(amax, (0, 0, 0, -rows % height)).unflatten(0, (-1, height)).amax(1)


def block_range(x: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Least and greatest number of each block and zero, fp32 [R, C] each; NaN where the block has a NaN."""
    least = -_reduce(x, block, lambda tiles: _amax(-tiles), torch.maximum)
    return least.clamp(max=0), _reduce(x, block, _amax, torch.maximum).clamp(min=0)


def block_sum(x: Tensor, block: Block) -> Tensor:
    """Sum of each block, fp32 [R, C]."""
    return _reduce(x, block, lambda tiles: tiles.sum((1, 3)), torch.add)


def block_absmean(x: Tensor, block: Block) -> Tensor:
    """Mean magnitude of each block, fp32 [R, C], summed pairwise in fp64. Infinities count as the greatest fp32
    number.
    """
    limit = torch.finfo(torch.float32).max

    def magnitudes(tiles: Tensor) -> Tensor:
        terms = tiles.abs().clamp(max=limit).to(torch.float64).transpose(1, 2).flatten(2)
        return pairwise_sum(terms)

    total = _reduce(x, block, magnitudes, torch.add).to(torch.float64)
    rows, columns = x.shape
    heights = _extents(rows, block.rows, x.device)
    widths = _extents(columns, block.columns, x.device)
    return (total / (heights[:, None] * widths)).to(torch.float32)


def _extents(length: int, extent: int | None, device: torch.device) -> Tensor:
    """How many rows (or columns) each block has, fp64; an empty block counts as one, so that its mean is 0."""
    if extent is None:
        return torch.full((1,), max(length, 1), dtype=torch.float64, device=device)
    starts = torch.arange(0, length, extent, device=device)
    return (length - starts).clamp(max=extent).to(torch.float64)


def pairwise_sum(terms: Tensor) -> Tensor:
    """Sum over the last dimension by halving it, in an order that depends on its length alone."""
    if terms.shape[-1] == 0:
        return terms.new_zeros(terms.shape[:-1])
    while terms.shape[-1] > 1:
        if terms.shape[-1] % 2:
            terms = torch.nn.functional.pad(terms, (0, 1))
        half = terms.shape[-1] // 2
        terms = terms[..., :half] + terms[..., half:]
    return terms[..., 0]
