"""The noun Format: an element, the block that shares a scale, and the scale."""

import math
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch

from parco.formats.blocks import TENSOR, Block, group
from parco.formats.elements import DENSE_DTYPES, E2M1, TERNARIES, Element, Float, Integer
from parco.formats.scales import (
    UNSCALED,
    Scale,
    ScaleAbsmax,
    ScaleAbsmean,
    ScaleDelayed,
    ScaleE4M3,
    ScaleE8M0,
    ScaleRange,
    Unscaled,
)
from parco.formats.text import parse_parts, print_parts, unknown


class TensorSpec(NamedTuple):
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Format:
    """How the numbers of a matrix are written.

    `Format(element, block, scale)` is a value: equal parts make equal formats, `str` prints the name and
    `Format.parse(str(f)) == f`. It alone says which tensors an [N, K] matrix is stored in (`tensors`). Raises
    ValueError for parts that do not go together, such as an asymmetric float.
    """

    element: Element
    block: Block = TENSOR
    scale: Scale = UNSCALED

    def __post_init__(self) -> None:
        reason = _refusal(self.element, self.block, self.scale)
        if reason:
            raise ValueError(f"Format({self.element.name}, {self.block}, {self.scale}): {reason}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """The format that `text` names (`"int4:32"`, `"mxfp4"`); ValueError names the known ones."""
        parts = parse_parts(text)
        reason = _refusal(*parts)
        if reason:
            raise unknown(text, reason)
        return cls(*parts)

    def __str__(self) -> str:
        return print_parts(self.element, self.block, self.scale)

    @property
    def is_named(self) -> bool:
        """Whether its text stands for it: not where an element of one's own has no name, or that of another."""
        try:
            return Format.parse(str(self)) == self
        except ValueError:
            return False

    @property
    def bits(self) -> int:
        """Bits of one code as kernels read it, scales not counted."""
        return self.element.bits

    @property
    def per_byte(self) -> int:
        """Codes that share a byte as digits of base 3; 0 where a row is a stream of bits."""
        return self.element.per_byte if isinstance(self.element, Integer) else 0

    def bit_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` codes as a stream of bits."""
        return -(-columns * self.bits // 8)

    def row_bytes(self, columns: int) -> int:
        """Bytes of a stored row of `columns` codes."""
        return -(-columns // self.per_byte) if self.per_byte else self.bit_bytes(columns)

    @property
    def is_dense(self) -> bool:
        """Whether torch stores the matrix natively, as one tensor of `values`."""
        return self.dtype is not None

    @property
    def dtype(self) -> torch.dtype | None:
        """The torch dtype of a dense format, None for the others."""
        if isinstance(self.element, Float) and isinstance(self.scale, Unscaled):
            return DENSE_DTYPES.get(self.element)
        return None

    @property
    def is_asymmetric(self) -> bool:
        """Whether every block has a zero point."""
        return isinstance(self.scale, ScaleRange)

    @property
    def has_free_scales(self) -> bool:
        """Whether a block's scale may be any float of its dtype: neither a byte nor held to powers of two."""
        match self.scale:
            case ScaleAbsmax():
                return not self.scale.power_of_two
            case ScaleAbsmean() | ScaleRange() | ScaleDelayed():
                return True
            case Unscaled() | ScaleE8M0() | ScaleE4M3():
                return False

    @property
    def is_plain_integer(self) -> bool:
        """Whether the numbers are (code - zero) · scale with a stored float scale: what integer kernels and solvers
        work on. Ternary is not: its scale is a mean, and its codes are its own.
        """
        return isinstance(self.element, Integer) and isinstance(self.scale, ScaleAbsmax | ScaleRange)

    def tensors(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """The tensors that hold a matrix of `shape` = (N, K), in order.

        Dense: `values` [N, K]. Others: `codes` uint8 [N, ceil(K*bits/8)], each row a stream of codes, lowest bit first,
        or [N, ceil(K/5)], five digits to a byte, lowest first (ternary5); `scale` with one entry per block; `zero`
        uint8 of the same shape (asymmetric); `global_scale` fp32 [1] (NVFP4). Raises ValueError for a shape that is not
        of a matrix with columns.
        """
        if len(shape) != 2 or shape[0] < 0 or shape[1] < 1:
            raise ValueError(f"shape={tuple(shape)}: a format describes a matrix (rows >= 0, columns >= 1)")
        rows, columns = shape
        if self.dtype is not None:
            return {"values": TensorSpec((rows, columns), self.dtype)}
        specs = {"codes": TensorSpec((rows, self.row_bytes(columns)), torch.uint8)}
        counts = self.block.counts((rows, columns))
        match self.scale:
            case Unscaled():
                pass
            case ScaleE8M0():
                specs["scale"] = TensorSpec(counts, torch.uint8)
            case ScaleE4M3():
                specs["scale"] = TensorSpec(counts, torch.uint8)
                specs["global_scale"] = TensorSpec((1,), torch.float32)
            case ScaleDelayed():
                specs["scale"] = TensorSpec(counts, torch.float32)
            case ScaleAbsmax() | ScaleAbsmean():
                specs["scale"] = TensorSpec(counts, self.scale.dtype)
            case ScaleRange():
                specs["scale"] = TensorSpec(counts, self.scale.dtype)
                specs["zero"] = TensorSpec(counts, torch.uint8)
        return specs

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of all tensors of a matrix of `shape`."""
        return sum(spec.nbytes for spec in self.tensors(shape).values())


def _refusal(element: Element, block: Block, scale: Scale) -> str | None:
    """Why these parts make no format, or None."""
    dense = isinstance(element, Float) and element in DENSE_DTYPES
    match scale:
        case Unscaled():
            if not isinstance(element, Float):
                return "only floating-point elements go without a scale"
            return None if block == TENSOR else "a format without scale has no blocks (use TENSOR)"
        case _ if dense:
            return "fp32, bf16 and fp16 take no scale"
        case ScaleRange():
            return (
                None if isinstance(element, Integer) and element not in TERNARIES else "only integers can be asymmetric"
            )
        case ScaleAbsmean():
            return None if element in TERNARIES else "the absmean scale is ternary's"
        case ScaleAbsmax():
            if element in TERNARIES:
                return f"{element.name} takes the absmean scale"
            return (
                "a power-of-two fp32 scale is for floats"
                if scale.power_of_two and not isinstance(element, Float)
                else None
            )
        case ScaleE8M0():
            if not isinstance(element, Float):
                return "e8m0 scales are for floats"
            return None if block == group(32) else "an MX block is 1x32"
        case ScaleE4M3():
            if element != E2M1:
                return "e4m3 scales are NVFP4's, whose element is fp4_e2m1"
            return None if block in (group(16), Block(16, 16)) else "an NVFP4 block is 1x16 or 16x16"
        case ScaleDelayed():
            return (
                None
                if isinstance(element, Float) and block == TENSOR
                else "delayed scales are one per tensor of floats"
            )
