"""Launches of Triton kernels on tiles of a matrix."""

from typing import Any

import torch
from torch import Tensor


def run(kernel: Any, shape: tuple[int, int], tile: tuple[int, int], *arguments: Any, **constants: Any) -> None:
    """`kernel` on all tiles of a matrix of `shape`, on the device of its first argument, a tensor; the tile's sizes are
    its constants R and C, program p has tile (p // tiles in a row, p % tiles in a row).

    The grid has one dimension, because CUDA's others end at 65,535. Fused multiply-adds would change bits.
    """
    height, width = tile
    tiles = -(-shape[0] // height) * -(-shape[1] // width)
    warps = min(32, max(4, height * width // 1024))
    with torch.cuda.device_of(arguments[0]):
        kernel[(tiles,)](*arguments, **constants, R=height, C=width, num_warps=warps, enable_fp_fusion=False)


def bits_of(numbers: Tensor) -> Tensor:
    """bf16 as its bits: kernels round to it themselves, since Triton's interpreter cuts off instead."""
    return numbers.view(torch.int16) if numbers.dtype == torch.bfloat16 else numbers


def power_of_two(count: int) -> int:
    """The least power of two, from 8 on, that is at least `count`."""
    return 1 << max(3, (count - 1).bit_length())
