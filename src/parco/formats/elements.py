"""Elements: how one number is written, before any scale.

An element is a value that knows its width in bits and the number that each of its codes stands for. Four kinds exist:
`Float` (sign, exponent, mantissa), `PowerOfTwo` (an exponent alone: e8m0, which only scales use), `Integer` and
`Table`. Codes are unsigned integers. A float's code is its bit pattern; an integer's code is the integer plus an
offset, so that packed codes never carry a sign; a table's code is an index.

Widths, biases and extremes: OCP MX 1.0 for fp8, fp6, fp4 and e8m0; IEEE 754 for fp16 and fp32; BitNet b1.58 for
ternary; QLoRA (arXiv 2305.14314) for NF4.
"""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Float:
    """A floating-point element: one sign bit, `exponent_bits`, `mantissa_bits`, subnormals.

    `special` says what the top exponent is for: `"ieee"` (infinities and NaNs, as in fp16 and e5m2), `"nan"` (only
    the code of all ones is NaN, as in e4m3fn) or `"none"` (numbers throughout, as in the fp6 and fp4 elements).
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    special: Literal["ieee", "nan", "none"]

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def least_exponent(self) -> int:
        """Exponent of the least normal number, and of every subnormal."""
        return 1 - self.bias

    @property
    def greatest_exponent(self) -> int:
        """Exponent of the greatest finite number."""
        reserved = 2 if self.special == "ieee" else 1
        return (1 << self.exponent_bits) - reserved - self.bias

    @property
    def max_code(self) -> int:
        """Code of the greatest finite number."""
        magnitudes = 1 << (self.exponent_bits + self.mantissa_bits)
        if self.special == "ieee":
            return magnitudes - (1 << self.mantissa_bits) - 1
        return magnitudes - (2 if self.special == "nan" else 1)

    @property
    def nan_code(self) -> int | None:
        """Code of the canonical positive NaN, or None where the element has none."""
        if self.special == "none":
            return None
        top = (1 << (self.exponent_bits + self.mantissa_bits)) - 1
        return top if self.special == "nan" else top - (1 << (self.mantissa_bits - 1)) + 1

    @property
    def max(self) -> float:
        """The greatest finite number."""
        return self._magnitude(self.max_code)

    def _magnitude(self, code: int) -> float:
        exponent, mantissa = code >> self.mantissa_bits, code & ((1 << self.mantissa_bits) - 1)
        if exponent == 0:
            return mantissa * 2.0 ** (self.least_exponent - self.mantissa_bits)
        return (1 + mantissa / (1 << self.mantissa_bits)) * 2.0 ** (exponent - self.bias)

    def values(self) -> tuple[float, ...]:
        """The number of each code, in the order of codes: `2**bits` entries. For elements of at most 8 bits."""
        return _VALUES[self] if self in _VALUES else _float_values(self)


def _float_values(element: Float) -> tuple[float, ...]:
    assert element.bits <= 8, f"a table of {element.name} would have 2**{element.bits} entries"
    infinity = element.max_code + 1 if element.special == "ieee" else None
    magnitudes: list[float] = []
    for code in range(1 << (element.bits - 1)):
        if code <= element.max_code:
            magnitudes.append(element._magnitude(code))  # pyright: ignore[reportPrivateUsage]
        else:
            magnitudes.append(float("inf") if code == infinity else float("nan"))
    return tuple(magnitudes) + tuple(-value for value in magnitudes)


@dataclass(frozen=True)
class PowerOfTwo:
    """An unsigned exponent alone: code c stands for 2**(c - bias), the code of all ones for NaN; there is no zero."""

    name: str
    bits: int
    bias: int

    @property
    def nan_code(self) -> int:
        """Code of NaN."""
        return (1 << self.bits) - 1

    def values(self) -> tuple[float, ...]:
        """The number of each code, in the order of codes: `2**bits` entries."""
        return (*(2.0 ** (code - self.bias) for code in range(self.nan_code)), float("nan"))


@dataclass(frozen=True)
class Integer:
    """A signed integer written as code = integer + offset.

    `bits` from 2 to 8. The offset of a symmetric integer is 2**(bits-1); asymmetric formats carry an offset ("zero")
    per block instead. `least` and `greatest` bound the symmetric integer; int8 leaves out -128, so that its range is
    balanced. Stored codes are a stream of bits where `per_byte` is 0; where it is 5, as many share a byte as digits of
    base 3, and there is no other such packing. ValueError for another.
    """

    name: str
    bits: int
    least: int
    greatest: int
    offset: int
    per_byte: int = 0

    def __post_init__(self) -> None:
        if self.per_byte and (self.per_byte, self.greatest - self.least) != (5, 2):
            raise ValueError(f"per_byte={self.per_byte}: only ternary numbers share a byte, five of them")

    @property
    def codes(self) -> int:
        """Number of codes: the asymmetric integer takes all of them."""
        return 1 << self.bits


@dataclass(frozen=True)
class Table:
    """An element whose codes index `entries`, ascending numbers within [-1, 1]."""

    name: str
    bits: int
    entries: tuple[float, ...]

    def values(self) -> tuple[float, ...]:
        """The number of each code, in the order of codes."""
        return self.entries


Element = Float | Integer | Table

FP32 = Float("fp32", 8, 23, 127, "ieee")
BF16 = Float("bf16", 8, 7, 127, "ieee")
FP16 = Float("fp16", 5, 10, 15, "ieee")
E4M3 = Float("fp8_e4m3", 4, 3, 7, "nan")
E5M2 = Float("fp8_e5m2", 5, 2, 15, "ieee")
E3M2 = Float("fp6_e3m2", 3, 2, 3, "none")
E2M3 = Float("fp6_e2m3", 2, 3, 1, "none")
E2M1 = Float("fp4_e2m1", 2, 1, 1, "none")
E8M0 = PowerOfTwo("e8m0", 8, 127)


def integer(bits: int) -> Integer:
    """The symmetric integer of `bits` bits, 2 to 8. ValueError outside."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits}: an integer element has 2 to 8 bits")
    half = 1 << (bits - 1)
    return Integer(f"int{bits}", bits, 1 - half if bits == 8 else -half, half - 1, half)


TERNARY = Integer("ternary", 2, -1, 1, 1)
TERNARY5 = Integer("ternary5", 2, -1, 1, 1, per_byte=5)
"""`TERNARY` with five numbers to a byte: 3⁵ = 243."""
TERNARIES = (TERNARY, TERNARY5)
NF4 = Table(
    "nf4",
    4,
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)

DENSE_DTYPES: dict[Float, torch.dtype] = {FP32: torch.float32, BF16: torch.bfloat16, FP16: torch.float16}
"""Elements that torch stores natively: matrices of them are plain tensors of `values`."""

_VALUES = {element: _float_values(element) for element in (E4M3, E5M2, E3M2, E2M3, E2M1)}

ELEMENTS: dict[str, Element] = {
    element.name: element
    for element in (FP32, BF16, FP16, E4M3, E5M2, E3M2, E2M3, E2M1, *map(integer, range(2, 9)), NF4, *TERNARIES)
}
"""Every element by the name that format texts use."""
