"""One operand of a product: how it is written, and the numbers that are then multiplied.

A clamped operand is two parts whose numbers are added: the clamped matrix in its format, and the few residuals
x - clamp(x) in fp32. A product is linear, so adding the residuals to the decoded numbers and multiplying once gives
the dense product in few bits plus the sparse one in fp32, for less than any sparse product costs: at 4096 tokens of 768
numbers by 768 outputs the addition takes 0.2 ms, a product in CSR 8 ms, a dense one in bf16 129 ms and the product
itself 74 ms (one thread, AVX-512). Finding the quantiles costs more, 14 ms a side.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parco.formats import BF16 as _BF16
from parco.formats import Float, Format, ScaleE4M3, ScaleE8M0, Table, TensorSpec, Unscaled
from parco.kernels.cast import Encoded, Hadamard, decode, decode_tensors, encode, encode_transposed
from parco.kernels.cast.packing import read_codes, write_codes
from parco.kernels.cast.scaling import scale_numbers
from parco.kernels.cast.tiles import spread, tile, untile
from parco.training.recipe import Operand

_OUTLIERS = ("outlier_columns", "outlier_values")


@dataclass(frozen=True, eq=False)
class Written:
    """An operand [M, R] as it is multiplied: `encoded` and, where it was clamped, the residuals of each row: the same
    number n of each, int32 `columns` and fp32 `values` [M, n]. Where it is `turned` all this is of its transpose.
    """

    encoded: Encoded
    columns: Tensor | None = None
    values: Tensor | None = None
    turned: bool = False

    @property
    def device(self) -> torch.device:
        """Where its tensors lie."""
        return next(iter(self.encoded.tensors.values())).device

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All its tensors, from which and its format `restored` makes it again."""
        if self.columns is None or self.values is None:
            return self.encoded.tensors
        return {**self.encoded.tensors, **dict(zip(_OUTLIERS, (self.columns, self.values), strict=True))}

    def numbers(self) -> Tensor:
        """What it stands for, [M, R]: in its dtype where its format is dense, in fp32 where it is not."""
        if self.encoded.format.is_dense:
            found = self.encoded.tensors["values"]
        else:
            found = decode(self.encoded)
        if self.columns is not None and self.values is not None:
            found = found.scatter_add_(1, self.columns.to(torch.int64), self.values)
        return found.T if self.turned else found

    def in_codes(self) -> Encoded | None:
        """What it stands for, [M, R], as codes by rows; None where residuals are added to them."""
        if self.columns is not None:
            return None
        if not self.turned:
            return self.encoded
        form, shape = self.encoded.format, self.encoded.shape
        # Its blocks are square (`Operand.turns`), so scales turn too.
        tensors = {name: each if each.ndim == 1 else each.T.contiguous() for name, each in self.tensors.items()}
        tensors["codes"] = write_codes(read_codes(self.tensors["codes"], form, shape[1]).T.contiguous(), form)
        return Encoded(form, shape[::-1], tensors)

    def in_bf16(self) -> tuple[Tensor, Tensor | None] | None:
        """bf16 numbers [M, R] and an fp32 scale of their rows, [M, 1] or [1, 1] (None: 1), that together are what it
        stands for; None where nothing of the kind is, or where tiles that take subnormal numbers for 0 would lose some.
        """
        form, tensors = self.encoded.format, self.encoded.tensors
        scale = tensors.get(_apart(form) or "")
        if self.columns is not None or not has_bf16(form) or (self.turned and scale is not None and scale.numel() > 1):
            return None
        if form.is_dense:
            found = tensors["values"]
        else:
            own = dict(tensors) if scale is None else {**tensors, str(_apart(form)): torch.ones_like(scale)}
            found = decode_tensors(form, self.encoded.shape, own, torch.bfloat16)
            if isinstance(form.scale, ScaleE8M0) and _has_subnormals(form.element, tensors["scale"], found):
                return None
        return found.T if self.turned else found, None if scale is None else scale.to(torch.float32).reshape(-1, 1)


@functools.cache
def has_bf16(format: Format) -> bool:
    """Whether every number of `format`, but for one scale of a row or of all, is one that bf16 has: floats of 4 to 8
    bits under no scale, e8m0 (whose exponent may leave the range, which only the data tell) or NVFP4's e4m3, and such
    floats and integers under a float scale of whole rows. bf16 itself is one.
    """
    if format.is_dense:
        return format.dtype == torch.bfloat16
    element = format.element
    fits = not isinstance(element, Table)
    if isinstance(element, Float):
        least = element.least_exponent - element.mantissa_bits
        fits = element.mantissa_bits <= _BF16.mantissa_bits and least >= _BF16.least_exponent
    whole_rows = format.block.columns is None and format.block.rows in (1, None)
    return fits and (isinstance(format.scale, Unscaled | ScaleE8M0 | ScaleE4M3) or whole_rows)


def _apart(format: Format) -> str | None:
    """The tensor of `format` that is no bf16 number, and so multiplies a product's sums."""
    if isinstance(format.scale, Unscaled | ScaleE8M0):
        return None
    return "global_scale" if isinstance(format.scale, ScaleE4M3) else "scale"


def _has_subnormals(element: Any, scale: Tensor, numbers: Tensor) -> bool:
    """Whether some of the bf16 `numbers` are subnormal. Only scales (e8m0 codes) below 2^-126 over the element's least
    number can make them so; blocks of zeros have such scales too, so these numbers are looked at.
    """
    assert isinstance(element, Float)  # no other element has e8m0 scales
    least = 127 - 126 - (element.least_exponent - element.mantissa_bits)
    if not bool((scale < least).any()):
        return False
    magnitude = numbers.view(torch.int16) & 0x7FFF
    return bool(((magnitude > 0) & (magnitude < 0x80)).any())


def restored(operand: Operand, shape: tuple[int, int], tensors: Iterator[Tensor]) -> Written:
    """What `write` made of a matrix of `shape` [M, R], from the next of the `tensors`, its own in their order."""
    named = {name: next(tensors) for name in tensors_of(operand, shape)}
    columns, values = (named.pop(name, None) for name in _OUTLIERS)
    return Written(Encoded(operand.format, padded_shape(operand, shape), named), columns, values)


def write(
    operand: Operand,
    x: Tensor,
    *,
    transposed: bool = False,
    seed: int = 0,
    sign_seed: int = 0,
    scale: Tensor | None = None,
) -> Written:
    """`x` [M, R], or its transpose where `transposed` (x is [R, M]), as an operand that is summed over R.

    `seed` is that of stochastic rounding, `sign_seed` the Hadamard transform's, `scale` fp32 [1, 1] a delayed scale.
    Before a transform zeros fill R up to a multiple of its size; they add nothing to a product.
    """
    columns = values = None
    if operand.clamp:
        x, columns, values = clamped(x.T if transposed else x, operand.clamp)
        transposed = False
    if operand.hadamard:
        x = padded(x, operand.hadamard, transposed=transposed)
    hadamard = Hadamard(operand.hadamard, sign_seed) if operand.hadamard else None
    if operand.is_plain:
        assert operand.format.dtype is not None
        # As torch casts, not saturating: a gradient that overflows fp16 must become inf for the loss scaler to see.
        dense = (x.T if transposed else x).to(operand.format.dtype)
        return Written(Encoded(operand.format, tuple(dense.shape), {"values": dense}))
    rounded: Any = {"rounding": operand.rounding, "seed": seed}
    if scale is not None:
        return Written(encode(x.T if transposed else x, operand.format, scale=scale, **rounded))
    written = encode_transposed if transposed else encode
    return Written(written(x, operand.format, hadamard=hadamard, **rounded), columns, values)


def tensors_of(operand: Operand, shape: tuple[int, int]) -> dict[str, TensorSpec]:
    """Shape and dtype of each of `Written.tensors`, as `write` makes them of a matrix of `shape` [M, R]."""
    rows, summed = padded_shape(operand, shape)
    specs = operand.format.tensors((rows, summed))
    count = _outliers(operand.clamp, summed) if operand.clamp else 0
    if count:
        own = TensorSpec((rows, 2 * count), torch.int32), TensorSpec((rows, 2 * count), torch.float32)
        specs |= dict(zip(_OUTLIERS, own, strict=True))
    return specs


def padded_shape(operand: Operand, shape: tuple[int, int]) -> tuple[int, int]:
    """The shape of the matrix that is written of one of `shape` [M, R]."""
    return shape[0], shape[1] + (-shape[1] % operand.hadamard if operand.hadamard else 0)


def _outliers(quantile: float, summed: int) -> int:
    """How many of `summed` numbers of a row lie beyond its quantile, on either side."""
    # R (1 - a) of a = 0.99 is a bit below or above a whole number as floats have it.
    return int((1 - quantile) * summed + 1e-6)


def padded(x: Tensor, size: int, *, transposed: bool = False) -> Tensor:
    """`x` with zeros up to a multiple of `size` along its last dimension, its first where `transposed`."""
    extra = -x.shape[0 if transposed else 1] % size
    return torch.nn.functional.pad(x, (0, 0, 0, extra) if transposed else (0, extra)) if extra else x


def clamped(x: Tensor, quantile: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`x` [M, R] with each row clamped between its quantiles 1 - a and a, and columns (int32) and values (fp32) of
    x - clamp(x), both [M, 2c].

    c = floor((1 - a) R) numbers of a row lie above the upper quantile and c below the lower one; with c = 0 the row is
    not clamped, and there are no residuals. Source: arXiv 2501.17116.
    """
    count = _outliers(quantile, x.shape[1])
    if not count:
        return x, None, None
    sides = [x.topk(count + 1, dim=1, largest=largest) for largest in (True, False)]
    upper, lower = (side.values[:, -1:] for side in sides)
    residuals = [side.values[:, :-1].float() - side.values[:, -1:].float() for side in sides]
    columns = torch.cat([side.indices[:, :-1] for side in sides], 1).to(torch.int32)
    return x.clamp(lower, upper), columns, torch.cat(residuals, 1)


def units(encoded: Encoded) -> Tensor | float:
    """What a one of the element stands for at each number of a matrix [M, R]: fp32 [M, R], 1.0 without scales."""
    scale = scale_numbers(encoded.format, encoded.tensors)
    if scale is None:
        return 1.0
    rows, columns = encoded.shape
    block = encoded.format.block
    shape = (rows, columns)
    ones = tile(torch.ones(1, 1, device=scale.device).expand(shape), block)
    return untile(ones * spread(scale), shape)


def estimator(operand: Operand, weight: Tensor, written: Written) -> Tensor:
    """The derivative that the differentiable gradient estimator gives the cast of `weight` [N, K]: fp32 [N, K].

    With k = `operand.dge`: min(1/k |2u/d - 1|^(1/k - 1), 3), u the offset of the scaled weight inside the interval of
    the element's grid around it and d the interval's width; 0 beyond the grid. Under a scale of its own amax nothing
    lies beyond; under one that is rounded down, or delayed, numbers may. Source: arXiv 2501.17116, with
    the bound of its authors' MS-AMP.
    """
    k, grid = operand.dge, _grid(operand.format.element, weight.device)
    unit = units(written.encoded)
    scaled = weight.detach().to(torch.float32).abs() / unit
    if isinstance(unit, Tensor):
        scaled = torch.where(unit == 0, 0.0, scaled)  # a block of zeros
    place = torch.bucketize(scaled, grid[1:-1], right=True)
    below, above = grid[place], grid[place + 1]
    offset = (2 * (scaled - below) / (above - below) - 1).abs()
    slope = (offset ** (1 / k - 1) / k).clamp(max=3)
    # amax / scale, both rounded, may exceed the grid's end by some 2^-23 of it.
    return torch.where(scaled > grid[-1] * (1 + 1e-6), 0.0, slope)


@functools.cache
def _grid(element: Any, device: torch.device) -> Tensor:
    """The magnitudes that a float of at most 8 bits has, ascending."""
    assert isinstance(element, Float)
    return torch.tensor(element.values()[: element.max_code + 1], device=device)
