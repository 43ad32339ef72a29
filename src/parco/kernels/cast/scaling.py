"""Scaling: which scales a format gives to the blocks of a matrix, and what they are as numbers.

Sources: OCP MX 1.0 and, for rceil, cuBLAS' block quantization (MX); arXiv 2509.25149 (NVFP4); BitNet b1.58 (ternary).
MX and NVFP4 follow torchao's order of operations and give its bits, with three exceptions: a block of MX scale
2**-127 is divided by that (torchao divides by another number than it multiplies with), rceil looks at the mantissa
(torchao at a rounded log2), and NVFP4's block scale has no floor of 2**-6.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from parco.formats import (
    E2M1,
    E4M3,
    E8M0,
    Element,
    Float,
    Format,
    Integer,
    ScaleAbsmax,
    ScaleAbsmean,
    ScaleDelayed,
    ScaleE4M3,
    ScaleE8M0,
    ScaleRange,
    ScaleRule,
    Table,
    Unscaled,
)
from parco.kernels.cast.amax import greatest_amax
from parco.kernels.cast.hadamard import Hadamard, turned_amax
from parco.kernels.cast.rounding import from_codes, to_codes
from parco.kernels.cast.tiles import block_absmean, block_amax, block_range

ABSMEAN_FLOOR = 1e-5
GLOBAL_FLOOR = 2.0**-117
"""Least global scale of NVFP4: its reciprocal, divided by the least e4m3 scale, is still a finite fp32 number."""

_LARGEST = torch.finfo(torch.float32).max
_FRACTION = (1 << 23) - 1


def find_scales(x: Tensor, format: Format, global_scale: Tensor | None = None) -> dict[str, Tensor]:
    """The scale tensors that `format` gives the matrix `x` [N, K], as stored: `scale` and perhaps `zero` or
    `global_scale`.

    A block that holds a NaN has the scale NaN. `global_scale` (fp32 [1]) replaces NVFP4's own. A delayed scale cannot
    be found from `x`: ValueError.
    """
    block, element = format.block, format.element
    match format.scale:
        case Unscaled():
            return {}
        case ScaleDelayed():
            raise ValueError(
                f"format {format}: a delayed scale comes from earlier steps, pass scale= (DelayedScaling keeps it)"
            )
        case ScaleAbsmax(dtype, power_of_two):
            scale = block_amax(x, block).clamp(max=_LARGEST) / greatest(element)
            return {"scale": _saturate(_next_power_of_two(scale) if power_of_two else scale, dtype)}
        case ScaleAbsmean(dtype):
            return {"scale": _saturate(block_absmean(x, block).clamp(min=ABSMEAN_FLOOR), dtype)}
        case ScaleRange(dtype):
            assert isinstance(element, Integer)
            least, most = (bound.clamp(-_LARGEST, _LARGEST) for bound in block_range(x, block))
            scale = _saturate(most / (element.codes - 1) - least / (element.codes - 1), dtype)
            return {"scale": scale, "zero": zero_point(least, scale, element)}
        case ScaleE8M0(rule):
            assert isinstance(element, Float)
            return {"scale": _e8m0(block_amax(x, block), element, rule)}
        case ScaleE4M3():
            amax = block_amax(x, block)
            if global_scale is None:
                global_scale = nvfp4_global_scale(torch.nan_to_num(amax, nan=0.0, posinf=_LARGEST))
            codes = to_codes(amax / E2M1.max / global_scale, E4M3, "nearest")
            return {"scale": codes, "global_scale": global_scale}


def rule(format: Format) -> str | None:
    """The name in `codes.RULES` of how the format's scales are found, or None where one pass cannot find them."""
    if format.block.rows != 1:
        return None
    match format.scale:
        case ScaleE8M0(name):
            return name
        case ScaleE4M3():
            return "e4m3"
        case ScaleAbsmax(_, power_of_two):
            return None if power_of_two else "absmax"
        case _:
            return None


def greatest(element: Element) -> float:
    """The number to which an absmax scale maps a block's greatest magnitude."""
    match element:
        case Float():
            return element.max
        case Integer():
            return float(element.greatest)
        case Table():
            return element.entries[-1]


def zero_point(least: Tensor, scale: Tensor, element: Integer) -> Tensor:
    """The code that stands for 0 in blocks whose least number is `least` <= 0: uint8, of `scale`'s shape."""
    zero = torch.round(torch.nan_to_num(-least / scale.to(torch.float32), nan=0.0))
    return zero.clamp(0, element.codes - 1).to(torch.uint8)


def nvfp4_global_scale(block_amax: Tensor) -> Tensor:
    """amax / (448 * 6), fp32 [1], at least 2**-117."""
    amax = block_amax.amax() if block_amax.numel() else block_amax.new_zeros(())
    return (amax / (E4M3.max * E2M1.max)).clamp(min=GLOBAL_FLOOR).reshape(1)


def own_global_scale(x: Tensor, format: Format) -> Tensor:
    """NVFP4's global scale of x [N, K]: fp32 [1]."""
    return nvfp4_global_scale(greatest_amax(x, format.block.columns or x.shape[1]))


def turned_global_scale(x: Tensor, format: Format, hadamard: Hadamard) -> Tensor:
    """`own_global_scale` of the transpose of x [N, K] after its transform. ValueError where N does not fit it."""
    hadamard.check(x.shape[0])
    amax = turned_amax(x, hadamard.size, hadamard.seed, format.block.columns or hadamard.size)
    return nvfp4_global_scale(torch.nan_to_num(amax, nan=0.0, posinf=_LARGEST))


def poison(scale: Tensor, format: Format, has_nan: Tensor) -> Tensor:
    """`scale` with NaN in place of the scales of the blocks that `has_nan`, both [R, C]."""
    match format.scale:
        case ScaleE8M0():
            return torch.where(has_nan, E8M0.nan_code, scale)
        case ScaleE4M3():
            assert E4M3.nan_code is not None
            return torch.where(has_nan, E4M3.nan_code, scale)
        case Unscaled() | ScaleAbsmax() | ScaleAbsmean() | ScaleRange() | ScaleDelayed():
            return torch.where(has_nan, float("nan"), scale)


def scale_numbers(format: Format, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """What codes are multiplied with, fp32 of the shape of the stored scale; None for unscaled formats."""
    match format.scale:
        case Unscaled():
            return None
        case ScaleE8M0():
            return from_codes(tensors["scale"], E8M0)
        case ScaleE4M3():
            return from_codes(tensors["scale"], E4M3) * tensors["global_scale"]
        case ScaleAbsmax() | ScaleAbsmean() | ScaleRange() | ScaleDelayed():
            return tensors["scale"].to(torch.float32)


def scale_reciprocals(format: Format, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """What numbers are multiplied with before rounding, where the format multiplies; None where it divides by the
    scale.

    MX: exact powers of two. NVFP4: (1 / global_scale) / scale, 0 for blocks whose scale is 0.
    """
    match format.scale:
        case ScaleE8M0():
            return 1.0 / from_codes(tensors["scale"], E8M0)
        case ScaleE4M3():
            scale = from_codes(tensors["scale"], E4M3)
            return torch.where(scale == 0, 0.0, (1.0 / tensors["global_scale"]) / scale)
        case Unscaled() | ScaleAbsmax() | ScaleAbsmean() | ScaleRange() | ScaleDelayed():
            return None


def _saturate(scale: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return scale.clamp(max=limit).to(dtype)


def _next_power_of_two(scale: Tensor) -> Tensor:
    """The least power of two that is at least `scale`; 0, NaN and what is above 2**127 stay as they are."""
    mantissa, exponent = torch.frexp(scale)
    power = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
    return torch.where((scale > 0) & torch.isfinite(power), power, scale)


def _e8m0(amax: Tensor, element: Float, rule: ScaleRule) -> Tensor:
    """e8m0 codes (uint8) of blocks with `amax`, by one of the four rules. Infinite amax saturates."""
    if rule == "rceil":
        descale = amax / element.max
        bits = descale.view(torch.int32)
        code = (bits >> 23) + ((bits & _FRACTION) > 0)
        code = torch.where(descale <= 2.0**-127, 0, code).clamp(max=254)
    else:
        bits = amax.view(torch.int32)
        if rule == "even":
            bits = bits + (1 << (22 - element.mantissa_bits))
        code = bits >> 23
        if rule == "ceil":
            code = code + ((bits & _FRACTION) > 0)
        code = (code - element.greatest_exponent).clamp(0, 254)
    return torch.where(torch.isnan(amax), E8M0.nan_code, code).to(torch.uint8)
