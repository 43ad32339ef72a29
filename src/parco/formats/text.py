"""The text form of formats: a name, then block, `asym` and scale dtype, separated by colons.

    fp32 bf16 fp16                    dense
    int4:32  int8:row  int3:64:asym  int4:32:fp32
    nf4:64  ternary  ternary:row  ternary5
    fp8_e4m3  fp8_e4m3:tensor  fp8_e5m2:1x128  fp8_e4m3:128x128:pow2  fp8_e4m3:tensor:delayed
    mxfp8_e4m3  mxfp6_e2m3  mxfp4:floor
    nvfp4  nvfp4:16x16

A part that has its default value is left out: groups of one row have bf16 scales, rows, tensors and larger blocks
fp32 ones; fp8 scales are fp32 throughout; the MX rule is rceil; an NVFP4 block is 1x16.
"""

import torch

from parco.formats.blocks import TENSOR, Block, group, parse_block
from parco.formats.elements import (
    DENSE_DTYPES,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    ELEMENTS,
    TERNARIES,
    Element,
    Float,
    Integer,
)
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
    Unscaled,
)

Parts = tuple[Element, Block, Scale]

MX_ELEMENTS: dict[str, Float] = {
    "mxfp8_e4m3": E4M3,
    "mxfp8_e5m2": E5M2,
    "mxfp6_e2m3": E2M3,
    "mxfp6_e3m2": E3M2,
    "mxfp4": E2M1,
}
NAMES: tuple[str, ...] = (
    *("fp32", "bf16", "fp16"),
    *(f"int{bits}:{columns}" for bits in range(2, 9) for columns in (32, 64, 128)),
    *(
        "int8:row",
        "int4:row",
        "int8:tensor",
        "int8:column",
        "int4:32:asym",
        "int3:64:asym",
        "int8:row:asym",
        "int4:32:fp32",
    ),
    *("int4:128:asym:fp16", "int4:32x32", "nf4:64", "nf4:64:fp32", "ternary", "ternary:row"),
    *("ternary5", "ternary5:row"),
    *("fp8_e4m3", "fp8_e5m2", "fp6_e2m3", "fp6_e3m2", "fp4_e2m1"),
    *(
        f"{name}:{block}"
        for name in ("fp8_e4m3", "fp8_e5m2")
        for block in ("tensor", "row", "column", "1x128", "128x128")
    ),
    *("fp8_e4m3:128x128:pow2", "fp8_e4m3:tensor:delayed", "fp8_e5m2:tensor:delayed"),
    *MX_ELEMENTS,
    *(f"mxfp4:{rule}" for rule in SCALE_RULES if rule != "rceil"),
    *("nvfp4", "nvfp4:16x16"),
)
"""Names of every family of formats, those that the laws are checked on. Other blocks and scale dtypes are named
likewise.
"""
EXAMPLES = (
    "fp32, bf16, fp16, int2:32 ... int8:128, int8:row, int4:32:asym, nf4:64, ternary, ternary5, fp8_e4m3:row, "
    f"fp8_e5m2:1x128, {', '.join(MX_ELEMENTS)}, mxfp4:floor, nvfp4"
)
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def default_scale_dtype(element: Element, block: Block) -> torch.dtype:
    """The dtype of a scale whose text names none: bf16 for groups of integers or of a table, fp32 otherwise."""
    return torch.bfloat16 if block.is_group and not isinstance(element, Float) else torch.float32


def print_parts(element: Element, block: Block, scale: Scale) -> str:
    """The canonical text of a format's parts."""
    match scale:
        case Unscaled():
            return element.name
        case ScaleE8M0(rule):
            # An element of one's own has no name in MX; its text is for people.
            name = next((name for name, member in MX_ELEMENTS.items() if member == element), f"mx{element.name}")
            return name if rule == "rceil" else f"{name}:{rule}"
        case ScaleE4M3():
            return "nvfp4" if block == group(16) else f"nvfp4:{block}"
        case ScaleDelayed():
            return f"{element.name}:{block}:delayed"
        case ScaleAbsmax() | ScaleRange() | ScaleAbsmean():
            return _print_scaled(element, block, scale)


def _print_scaled(element: Element, block: Block, scale: ScaleAbsmax | ScaleRange | ScaleAbsmean) -> str:
    parts = [element.name]
    if not (element in TERNARIES and block == TENSOR and scale.dtype == torch.float32):
        parts.append(str(block.columns) if block.is_group and not isinstance(element, Float) else str(block))
    if isinstance(scale, ScaleRange):
        parts.append("asym")
    if isinstance(scale, ScaleAbsmax) and scale.power_of_two:
        parts.append("pow2")
    if scale.dtype != default_scale_dtype(element, block):
        parts.append(DTYPE_NAMES[scale.dtype])
    return ":".join(parts)


def parse_parts(text: str) -> Parts:
    """The parts of the format that `text` names. ValueError says what is wrong with it and names what exists."""
    if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"format {text!r}: must be a text such as 'int4:32', not {type(text).__name__}")
    try:
        return _parse(text.strip())
    except ValueError as error:
        raise unknown(text, str(error)) from None


def unknown(text: str, reason: str) -> ValueError:
    """The error that says why `text` names no format and what does."""
    return ValueError(f"unknown format {text!r}: {reason}. Known: {EXAMPLES}")


def _parse(text: str) -> Parts:
    name, *options = text.split(":")
    if name in MX_ELEMENTS:
        return MX_ELEMENTS[name], group(32), _parse_rule(name, options)
    if name == "nvfp4":
        block = group(16) if not options else parse_block(options.pop(0))
        _refuse_rest(name, options)
        return E2M1, block, ScaleE4M3()
    if name not in ELEMENTS:
        raise ValueError(f"no element is called {name!r}")
    element = ELEMENTS[name]
    if not options:
        if element in TERNARIES:
            return element, TENSOR, ScaleAbsmean()
        if not isinstance(element, Float):
            raise ValueError(f"{name} needs a block, such as {name}:32 or {name}:row")
        return element, TENSOR, Unscaled()
    if isinstance(element, Float) and element in DENSE_DTYPES:
        raise ValueError(f"{name} takes no block and no scale")
    return _parse_scaled(element, parse_block(options[0]), options[1:])


def _parse_rule(name: str, options: list[str]) -> ScaleE8M0:
    if not options:
        return ScaleE8M0()
    rule, *rest = options
    _refuse_rest(name, rest)
    for known in SCALE_RULES:
        if rule == known:
            return ScaleE8M0(known)
    raise ValueError(f"scale rule {rule!r} is none of {', '.join(SCALE_RULES)}")


def _parse_scaled(element: Element, block: Block, options: list[str]) -> Parts:
    kind = ""
    if options and options[0] in ("asym", "pow2", "delayed"):
        kind, options = options[0], options[1:]
    if kind == "delayed":
        _refuse_rest("delayed", options)
        return element, block, ScaleDelayed()
    dtype = default_scale_dtype(element, block)
    if options and options[0] in _DTYPES:
        dtype, options = _DTYPES[options[0]], options[1:]
    _refuse_rest(element.name, options)
    if kind == "asym":
        if not isinstance(element, Integer) or element in TERNARIES:
            raise ValueError(f"{element.name} cannot be asymmetric, only integers can")
        return element, block, ScaleRange(dtype)
    if element in TERNARIES:
        if kind:
            raise ValueError(f"{element.name} does not take {kind!r}")
        return element, block, ScaleAbsmean(dtype)
    return element, block, ScaleAbsmax(dtype, power_of_two=kind == "pow2")


def _refuse_rest(name: str, options: list[str]) -> None:
    if options:
        raise ValueError(f"{name} does not take {':'.join(options)!r} here (order: block, asym, scale dtype)")
