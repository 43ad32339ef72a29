"""Matrices in GGML's types, the ones that llama.cpp computes with.

Each type cuts a row into blocks of 32 numbers (TQ2_0: of 256) and puts a block's scale and its codes side by side:

| type | block, in bytes | number |
| --- | --- | --- |
| Q8_0 | fp16 scale d, 32 int8 q | d · q |
| Q4_0 | d, 16 bytes of nibbles q | d · (q − 8) |
| Q4_1 | d, fp16 m, 16 bytes | d · q + m |
| TQ2_0 | 64 bytes of pairs of bits q, d | d · (q − 1) |
| MXFP4 | e8m0 scale, 16 bytes of e2m1 | as OCP MX |

Byte i of 16 holds the numbers i and i + 16; byte i of each 32 of TQ2_0 holds i, i + 32, i + 64 and i + 96 of 128. A
Weight whose codes and scales fit a type is rearranged, and both stand for the same numbers. Source: ggml-common.h and
ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from parco.formats import E2M1, TERNARY, Format, Integer, ScaleAbsmax, ScaleAbsmean, ScaleE8M0, ScaleRange
from parco.kernels.cast import unpack
from parco.weights import Dense, Quantized, Weight

if TYPE_CHECKING:
    import numpy

BLOCK = {"F32": 1, "F16": 1, "BF16": 1, "Q8_0": 32, "Q4_0": 32, "Q4_1": 32, "TQ2_0": 256, "MXFP4": 32}
"""The types that are written, and the columns that share a block of each; a row is whole blocks."""

_DENSE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def type_of(spec: Weight) -> str:
    """The type that holds what `spec` stores, scales aside, which must be fp16 there. ValueError where none does."""
    if isinstance(spec, Dense):
        (values,) = spec.tensors().values()
        return _DENSE[values.dtype]
    if not isinstance(spec, Quantized):
        raise ValueError(f"{spec} is of several parts, and GGML's types are of one")
    columns = spec.shape[1]
    for name in _candidates(spec.format):
        block = spec.format.block.columns
        if columns % BLOCK[name] == 0 and (block is None or block >= columns or block % BLOCK[name] == 0):
            return name
    raise ValueError(f"none of GGML's types holds what {spec} stores")


def _candidates(form: Format) -> tuple[str, ...]:
    """The types that can tell the codes of `form` apart, the smallest first."""
    match form.element, form.scale:
        case Integer() as element, ScaleAbsmean() if element == TERNARY:
            return "TQ2_0", "Q4_0"
        case Integer() as element, ScaleAbsmax():
            return ("Q4_0",) if element.bits <= 4 else ("Q8_0",)
        case Integer() as element, ScaleRange() if element.bits <= 4:
            return ("Q4_1",)
        case element, ScaleE8M0() if element == E2M1:
            return ("MXFP4",)
        case _:
            return ()


def rearranged(spec: Weight, tensors: Mapping[str, Tensor], round_scales: bool = False) -> Tensor:
    """The bytes, uint8 [N, bytes of a row], of what `spec` stores in `tensors`, as the type `type_of(spec)`.

    They stand for the same numbers; with `round_scales`, scales that are no fp16 numbers are rounded to such (by 2⁻¹¹
    of their size), and where fp16 has none that comes near, or without it, there is a ValueError.
    """
    name = type_of(spec)
    if isinstance(spec, Dense):
        return tensors["values"].contiguous().view(torch.uint8)
    assert isinstance(spec, Quantized)
    codes = unpack(tensors["codes"], spec.format.bits, spec.shape[1])
    scale = _per_block(spec, tensors["scale"], BLOCK[name])
    if name == "MXFP4":
        return _side_by_side(scale[..., None], _nibbles(codes))
    assert isinstance(spec.format.element, Integer)
    offset = spec.format.element.offset
    if name == "Q4_1":
        zero = _per_block(spec, tensors["zero"], BLOCK[name])
        least = _fp16(-zero.float() * scale.float(), spec, round_scales)
        return _side_by_side(_fp16(scale, spec, round_scales), least, _nibbles(codes))
    stored = _fp16(scale, spec, round_scales)
    if name == "Q8_0":
        integers = (codes.to(torch.int16) - offset).to(torch.int8).view(torch.uint8)
        return _side_by_side(stored, integers.reshape(*scale.shape, 32))
    if name == "TQ2_0":
        return _side_by_side(_pairs(codes), stored)
    return _side_by_side(stored, _nibbles(codes + (8 - offset)))


def _per_block(spec: Quantized, scale: Tensor, columns: int) -> Tensor:
    """One entry for each block of `columns` in each row."""
    rows, blocks = spec.shape[0], spec.shape[1] // columns
    block = spec.format.block
    tall = rows if block.rows is None else block.rows
    wide = blocks if block.columns is None else -(-block.columns // columns)
    return scale.repeat_interleave(tall, 0)[:rows].repeat_interleave(wide, 1)[:, :blocks]


def _fp16(scale: Tensor, spec: Weight, round_scales: bool) -> Tensor:
    """[N, B] -> uint8 [N, B, 2]."""
    rounded = scale.to(torch.float16)
    if not round_scales and not torch.equal(rounded.float(), scale.float()):
        raise ValueError(f"{spec} has scales that are no fp16 numbers, as GGML's are; round_scales=True rounds them")
    # Rounding among normal numbers errs by 2⁻¹¹ at most; a scale below them, or above, by more.
    if not bool(((rounded.float() - scale.float()).abs() <= 2.0**-11 * scale.float().abs()).all()):
        raise ValueError(f"{spec} has scales beyond fp16, from {scale.abs().min():.3g} to {scale.abs().max():.3g}")
    return rounded[..., None].contiguous().view(torch.uint8)


def _nibbles(codes: Tensor) -> Tensor:
    """uint8 [N, K] -> uint8 [N, K / 32, 16]."""
    halves = codes.reshape(codes.shape[0], -1, 2, 16)
    return halves[:, :, 0] | (halves[:, :, 1] << 4)


def _pairs(codes: Tensor) -> Tensor:
    """uint8 [N, K] -> uint8 [N, K / 256, 64]."""
    parts = codes.reshape(codes.shape[0], -1, 2, 4, 32).unbind(3)
    return (parts[0] | (parts[1] << 2) | (parts[2] << 4) | (parts[3] << 6)).flatten(2)


def _side_by_side(*parts: Tensor) -> Tensor:
    return torch.cat(parts, dim=-1).flatten(1)


def quantized(matrix: Tensor, name: str) -> Tensor:
    """The bytes of a dense matrix [N, K], rounded as llama.cpp's own quantizer does (without an importance matrix).
    ValueError where K is no multiple of the type's block.
    """
    if matrix.shape[1] % BLOCK[name]:
        raise ValueError(f"a row of {matrix.shape[1]} numbers is no whole number of {name}'s blocks of {BLOCK[name]}")
    if name in _DENSE.values():
        dtype = next(dtype for dtype, known in _DENSE.items() if known == name)
        return matrix.to(dtype).contiguous().view(torch.uint8)
    from gguf import GGMLQuantizationType, quants

    found: numpy.ndarray[Any, Any] = quants.quantize(matrix.float().numpy(), GGMLQuantizationType[name])
    return torch.from_numpy(found)
