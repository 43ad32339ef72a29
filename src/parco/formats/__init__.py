"""Formats: how numbers are written. Descriptions only; `parco.kernels.cast` encodes and decodes.

>>> from parco import formats
>>> f = formats.parse("int4:32")
>>> str(f), f.bits, f.nbytes((1024, 4096))
('int4:32', 4, 2359296)
>>> f.tensors((2, 64))["codes"]
TensorSpec(shape=(2, 32), dtype=torch.uint8)
"""

from parco.formats.blocks import COLUMN, ROW, TENSOR, Block, group
from parco.formats.elements import (
    BF16,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    E8M0,
    ELEMENTS,
    FP16,
    FP32,
    NF4,
    TERNARIES,
    TERNARY,
    TERNARY5,
    Element,
    Float,
    Integer,
    PowerOfTwo,
    Table,
    integer,
)
from parco.formats.format import Format, TensorSpec
from parco.formats.scales import (
    DTYPE_NAMES,
    SCALE_RULES,
    Scale,
    ScaleAbsmax,
    ScaleAbsmean,
    ScaleDelayed,
    ScaleE4M3,
    ScaleE8M0,
    ScaleRange,
    ScaleRule,
    Unscaled,
)
from parco.formats.text import NAMES

NVFP4 = Format(E2M1, group(16), ScaleE4M3())
MXFP8 = Format(E4M3, group(32), ScaleE8M0())
MXFP4 = Format(E2M1, group(32), ScaleE8M0())
INT8 = Format(integer(8), ROW, ScaleAbsmax())
INT4 = Format.parse("int4:32")


def parse(text: str | Format) -> Format:
    """The format that `text` names; a Format is returned as it is. ValueError names the known formats."""
    return text if isinstance(text, Format) else Format.parse(text)


__all__ = [
    "BF16",
    "COLUMN",
    "DTYPE_NAMES",
    "E2M1",
    "E2M3",
    "E3M2",
    "E4M3",
    "E5M2",
    "E8M0",
    "ELEMENTS",
    "FP16",
    "FP32",
    "INT4",
    "INT8",
    "MXFP4",
    "MXFP8",
    "NAMES",
    "NF4",
    "NVFP4",
    "ROW",
    "SCALE_RULES",
    "TENSOR",
    "TERNARIES",
    "TERNARY",
    "TERNARY5",
    "Block",
    "Element",
    "Float",
    "Format",
    "Integer",
    "PowerOfTwo",
    "Scale",
    "ScaleAbsmax",
    "ScaleAbsmean",
    "ScaleDelayed",
    "ScaleE4M3",
    "ScaleE8M0",
    "ScaleRange",
    "ScaleRule",
    "Table",
    "TensorSpec",
    "Unscaled",
    "group",
    "integer",
    "parse",
]
