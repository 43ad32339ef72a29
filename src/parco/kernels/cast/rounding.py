"""Rounding: from scaled numbers to an element's codes and back. Elementwise, hence independent of threads and tiles.

Three roundings: `nearest` (ties to even; ties to the lower entry of a table), `zero` (toward zero) and `stochastic`,
whose expectation is the number itself, between subnormals too (to 2**-32 of the spacing: it draws 32 bits per
element). All casts saturate: what lies beyond the greatest number of an element, infinities included, becomes that
number. NaN becomes NaN where the element has one; the greatest positive number in fp6 and fp4 (as PTX's cvt does);
zero in integers, whose block then has a NaN scale.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from parco.formats import Element, Float, Integer, PowerOfTwo, Table

Rounding = Literal["nearest", "zero", "stochastic"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)

_FRACTION = (1 << 23) - 1
_INFINITY = 0xFF << 23


def check_rounding(rounding: str) -> None:
    """ValueError unless `rounding` is one of ROUNDINGS."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding={rounding!r}: must be one of {', '.join(ROUNDINGS)}")


def to_codes(x: Tensor, element: Element, rounding: Rounding, random: Tensor | None = None) -> Tensor:
    """Codes of fp32 `x` in `element`, same shape: uint8, or int32 for elements of more than 8 bits.

    `random` holds 32 bits per element, as int64 in [0, 2**32), and is needed by stochastic rounding alone. Integers
    get their symmetric codes.
    """
    assert x.dtype == torch.float32
    assert (random is not None) == (rounding == "stochastic")
    match element:
        case Float():
            codes = _float_codes(x, element, rounding, random)
            return codes.to(torch.uint8) if element.bits <= 8 else codes
        case Integer():
            rounded = round_integers(x, rounding, random)
            return (rounded.clamp_(element.least, element.greatest) + element.offset).to(torch.uint8)
        case Table():
            return _table_codes(x, element, rounding, random)


def from_codes(codes: Tensor, element: Element | PowerOfTwo) -> Tensor:
    """fp32 numbers of uint8 `codes`, same shape. Integers by their symmetric offset."""
    if isinstance(element, Integer):
        return codes.to(torch.float32) - element.offset
    table = torch.tensor(element.values(), dtype=torch.float32, device=codes.device)
    return table.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)


def round_integers(x: Tensor, rounding: Rounding, random: Tensor | None) -> Tensor:
    """fp32 `x` rounded to whole numbers, NaN to 0; always a new tensor."""
    if rounding == "nearest":
        rounded = torch.round(x)
    elif rounding == "zero":
        rounded = torch.trunc(x)
    else:
        assert random is not None
        below = torch.floor(x)
        rounded = below + _draw(x - below, random)
    return torch.nan_to_num_(rounded, nan=0.0)


def _draw(fraction: Tensor, random: Tensor) -> Tensor:
    """True with probability `fraction`, in [0, 1]. In fp64, which holds the 32 random bits."""
    return random.to(torch.float64) < fraction.to(torch.float64) * 2.0**32


def _float_codes(x: Tensor, element: Float, rounding: Rounding, random: Tensor | None) -> Tensor:
    """int32 codes, by integer arithmetic on the bits of `x`, so that no mode of the processor (flushing) has a say.

    x = significand * 2**(exponent - 150) with a significand of 24 bits. Dropping `drop` of its bits leaves the
    multiple of the element's spacing, which, added to the code of the binade's start, is the code: a carry moves on
    to the next binade by itself.
    """
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    exponent = (magnitude >> 23).clamp_(min=1)
    significand = torch.where(magnitude > _FRACTION, (magnitude & _FRACTION) | (1 << 23), magnitude)
    binade = exponent - (element.least_exponent + 127)
    drop = (23 - element.mantissa_bits) - binade.clamp(max=0)
    codes = _drop_bits(significand, drop, rounding, random) + (binade.clamp_(min=0) << element.mantissa_bits)
    codes = codes.clamp_(max=element.max_code)
    nan_code = element.max_code if element.nan_code is None else element.nan_code
    is_nan = magnitude > _INFINITY
    codes = torch.where(is_nan, nan_code, codes)
    negative = bits < 0 if element.nan_code is not None else (bits < 0) & ~is_nan
    return codes | (negative.to(torch.int32) << (element.bits - 1))


def _drop_bits(significand: Tensor, drop: Tensor, rounding: Rounding, random: Tensor | None) -> Tensor:
    """`significand` / 2**drop, rounded: int32. `significand` has at most 24 bits."""
    if rounding == "stochastic":
        assert random is not None
        # Beyond 32 there are no random bits left to compare with: what lies below them is cut off first.
        wide = significand.to(torch.int64) >> (drop - 32).clamp_(0, 31)
        drop = drop.clamp(max=32).to(torch.int64)
        return ((wide + (random & ((1 << drop) - 1))) >> drop).to(torch.int32)
    # From 25 on, nearest and toward zero both give 0, and 25 keeps the sum below within 31 bits.
    drop = drop.clamp(max=25)
    kept = significand >> drop
    if rounding == "zero":
        return kept
    return (significand + ((1 << (drop - 1)) - 1) + (kept & 1)) >> drop


def _table_codes(x: Tensor, element: Table, rounding: Rounding, random: Tensor | None) -> Tensor:
    entries = torch.tensor(element.entries, dtype=torch.float32, device=x.device)
    x = torch.nan_to_num(x, nan=0.0).clamp_(element.entries[0], element.entries[-1])
    if rounding == "nearest":
        wide = entries.to(torch.float64)
        return _count_below(x, ((wide[1:] + wide[:-1]) / 2).to(torch.float32))
    interval = _count_below(x, entries[1:-1])
    index = interval.to(torch.int32)
    below, above = entries[index], entries[index + 1]
    if rounding == "zero":
        up = ((x < 0) & (x > below)) | (x == above)
    else:
        assert random is not None
        up = _draw((x - below) / (above - below), random)
    return interval + up


def _count_below(x: Tensor, bounds: Tensor) -> Tensor:
    """uint8 number of `bounds` below each of `x`. For the 15 bounds of a 4-bit table this beats a search's branches
    tenfold.
    """
    count = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for bound in bounds:
        count += x > bound
    return count


def to_power_of_two(x: Tensor) -> Tensor:
    """e8m0 codes (uint8) of fp32 `x`: the nearest power of two, ties upward, within 2**-127 and 2**127.

    NaN and what has no logarithm (zero and negative numbers) become NaN; infinity saturates. Between the two least
    powers it rounds up, as ml_dtypes does: subnormal numbers have no leading one whose follower would say which is
    nearer.
    """
    bits = x.view(torch.int32)
    least = (bits > (1 << 22)).to(torch.int32)
    nearest = (bits >> 23) + ((bits & _FRACTION) >> 22)
    codes = torch.where(bits <= _FRACTION, least, nearest).clamp_(max=254)
    return torch.where((x > 0) & ~torch.isnan(x), codes, 255).to(torch.uint8)
