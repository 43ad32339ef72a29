"""Moments in 8 bits: blocks of 256 numbers of a row under their greatest magnitude, in a code that is fine for great
numbers and reaches far down to small ones.

The idea is the dynamic tree of Dettmers et al. (arXiv 2110.02861), whose tables have a row of evenly spaced numbers for
each power of ten. Here it is powers of 8, [1/8, 1], [1/64, 1/8] ..., each with half as many numbers as the one above
it: where a number lies follows from its exponent, so that no table is searched. The greatest number of each power
belongs to it, 1 therefore is exact, and a block that only decays keeps its codes. The first moment has a sign and 7
bits, down to 8**-6. Of the second moment the root is coded, by which the step divides: in 8 bits without a sign, down
to 8**-7, and what is not zero never becomes zero.
"""

import torch
from torch import Tensor

BLOCK = 256
"""Numbers of a row that share a scale."""

LEAST = 2.0**-120
"""Greatest magnitudes below it count as zero; their reciprocals overflow."""


def code_values(signed: bool) -> Tensor:
    """What the 256 codes stand for, under the scale 1: fp32 [256]. The highest bit of a signed code is its sign."""
    bits = 7 if signed else 8
    magnitude = torch.arange(1 << bits, dtype=torch.float32)
    power = torch.exp2(torch.floor(torch.log2(magnitude.clamp(min=1))))  # how many numbers its power of 8 has
    values = torch.where(magnitude > 0, (7 * magnitude + 7 - 6 * power) * (power * power * 2.0 ** (-3 * bits)), 0.0)
    return torch.cat((values, -values)) if signed else values


def root(x: Tensor) -> Tensor:
    """The square root of fp32 `x`, rounded once: PyTorch's on a CPU may be a unit off."""
    return x.to(torch.float64).sqrt().to(torch.float32)


def _blocks(x: Tensor, width: int) -> Tensor:
    """[rows, columns] -> [rows, blocks, width], filled up with zeros."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % width)).unflatten(1, (-1, width))


def decode_moment(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The moment, fp32, of uint8 `codes` [rows, columns] under `scale` [rows, ceil(columns / 256)], same shape as
    codes: the first if `signed`, else the second.
    """
    values = code_values(signed).to(codes.device)[codes.to(torch.int32)]
    found = values * scale.repeat_interleave(BLOCK, 1)[:, : codes.shape[1]]
    return found if signed else found * found


def encode_moment(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes, uint8 [rows, columns], and scales, fp32 [rows, ceil(columns / 256)], of a moment, fp32 `x` [rows,
    columns], the first if `signed`, else the second: each number (of the second: its root) becomes the nearest of its
    power of 8, ties to even codes. A block with an infinity or NaN has the scale NaN.
    """
    bits = 7 if signed else 8
    rows, columns = x.shape
    blocks = _blocks(x if signed else root(x), BLOCK)
    amax = blocks.abs().amax(2, keepdim=True) if x.numel() else x.new_zeros(rows, blocks.shape[1], 1)
    scale = torch.where(amax.isfinite(), torch.where(amax < LEAST, 0.0, amax), torch.nan)
    y = blocks.abs() * torch.where(scale == 0, 0.0, 1 / scale)
    distance = (127 - (y.view(torch.int32) >> 23)).clamp(min=1)
    regime = (distance + 2) // 3 - 1
    up, down = torch.exp2(2.0 * regime), torch.exp2(-1.0 * regime)
    place = y * up * (2.0 ** (bits + 2) / 7) + (down * (3 * 2.0**bits / 7) - 1)
    code = torch.round(torch.nan_to_num(place, nan=0.0).clamp(min=0.0, max=2.0**bits - 1))
    if not signed:
        code = torch.where(y > 0, code.clamp(min=1.0), code)
    else:
        code = code + 128 * ((code > 0) & torch.signbit(blocks))
    return code.to(torch.uint8).flatten(1)[:, :columns].contiguous(), scale.squeeze(2)
