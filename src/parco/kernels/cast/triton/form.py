"""What a kernel is told of a format when it is compiled."""

import functools
import math
from typing import NamedTuple

from parco.formats import (
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
    Table,
    Unscaled,
)
from parco.formats.scales import DTYPE_NAMES
from parco.kernels.cast.scaling import greatest, rule


class Form(NamedTuple):
    """A format, and how numbers are rounded to it. `word` codes fill `word_bytes` bytes exactly."""

    kind: str  # of element: "float", "integer" or "table"
    bits: int
    mantissa_bits: int
    least_exponent: int
    greatest_exponent: int
    max_code: int
    nan_code: int  # -1: none
    least: int
    greatest: int
    offset: int
    is_asymmetric: bool
    largest: float  # to which an absmax scale maps a block's greatest magnitude
    scale: str  # as what scales are stored: "none", "fp32", "bf16", "fp16", "e8m0" or "e4m3"
    rule: str  # how they are found, or "given"
    rounding: str
    word: int
    word_bytes: int


@functools.cache
def form_of(name: str, rounding: str = "nearest") -> Form:
    """The Form of the format that `name` names."""
    format = Format.parse(name)
    element, common = format.element, math.gcd(format.bits, 8)
    is_float = isinstance(element, Float)
    whole = element if isinstance(element, Integer) else None
    return Form(
        kind=_kind(element),
        bits=format.bits,
        mantissa_bits=element.mantissa_bits if is_float else 0,
        least_exponent=element.least_exponent if is_float else 0,
        greatest_exponent=element.greatest_exponent if is_float else 0,
        max_code=element.max_code if is_float else 0,
        nan_code=element.nan_code if is_float and element.nan_code is not None else -1,
        least=0 if whole is None else whole.least,
        greatest=0 if whole is None else whole.greatest,
        offset=0 if whole is None else whole.offset,
        is_asymmetric=format.is_asymmetric,
        largest=greatest(element),
        scale=_scale(format),
        rule=rule(format) or "given",
        rounding=rounding,
        word=8 // common,
        word_bytes=format.bits // common,
    )


def _kind(element: Element) -> str:
    match element:
        case Float():
            return "float"
        case Integer():
            return "integer"
        case Table():
            return "table"


def _scale(format: Format) -> str:
    match format.scale:
        case Unscaled():
            return "none"
        case ScaleE8M0():
            return "e8m0"
        case ScaleE4M3():
            return "e4m3"
        case ScaleDelayed():
            return "fp32"
        case ScaleAbsmax(dtype) | ScaleAbsmean(dtype) | ScaleRange(dtype):
            return DTYPE_NAMES[dtype]
