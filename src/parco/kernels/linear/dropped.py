"""Dropout of what LoRA's A reads, some rows at a time: the mask is never whole, and made again for backward.

Which numbers are dropped, Philox says by a seed for each block of ROWS rows, the row within it and the column: the same
for any number of threads. On CUDA they are other numbers than on the CPU.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from parco.formats import parse
from parco.kernels.cast import encode
from parco.kernels.cast.codes import signed
from parco.kernels.rowwise import dropout

ROWS = 512
"""Of x at a time, whose sums in fp32 stay in the cache. Others would be other masks."""

_STEP = 0x9E3779B97F4A7C15
"""Between the seeds of blocks of ROWS: 2⁶⁴ over the golden ratio, as Philox steps its keys. By steps of 1 the second
block under one seed would be the first under the next.
"""

_WHOLE = parse("int8:row")
"""Whole numbers, where the scale is 1; codes are 128 above them."""


def factors_of(like: Tensor, p: float, seed: int) -> Iterator[tuple[slice, Tensor | None]]:
    """(rows, factors 0 or 1/(1 - p)) of a matrix of the shape of `like`, some rows at a time; None for factors where p
    is 0. They are fp32 at least: 1/(1 - p) in bf16 would be up to 2⁻⁹ off, and all of what is kept with it.
    """
    count, columns = like.shape
    wide = torch.promote_types(like.dtype, torch.float32)
    draw = _by_casting if like.device.type == "cuda" else _by_dropping
    for index, first in enumerate(range(0, count, ROWS)):
        rows = slice(first, min(first + ROWS, count))
        own = (seed + index * _STEP) % (1 << 64)
        yield rows, draw((rows.stop - first, columns), p, own, wide, like.device) if p else None


def _by_dropping(shape: tuple[int, int], p: float, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    found = dropout(torch.ones(shape, device=device), torch.tensor([signed(seed)], device="cpu"), p)
    return found if dtype == torch.float32 else (found > 0).to(dtype).mul_(1 / (1 - p))


def _by_casting(shape: tuple[int, int], p: float, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """1 - p rounded stochastically to whole numbers, whose random bits Triton draws."""
    kept, unit = torch.full(shape, 1 - p, device=device), torch.ones(shape[0], 1, device=device)
    drawn = encode(kept, _WHOLE, rounding="stochastic", seed=seed, scale=unit)
    return (drawn.tensors["codes"] & 1).to(dtype).mul_(1 / (1 - p))


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """x [M, K] with each number 0 with probability `p` and divided by 1 - p otherwise, rounded once."""
    found = torch.empty_like(x)
    for rows, factors in factors_of(x, p, seed):
        found[rows] = x[rows] if factors is None else x[rows] * factors
    return found
