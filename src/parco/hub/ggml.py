"""Matrices in GGML's types, the ones that llama.cpp computes with.

Each type cuts a row into blocks of 32 numbers (TQ1_0 and TQ2_0: of 256) and puts a block's scale and its codes side by
side:

| type | block, in bytes | number |
| --- | --- | --- |
| Q8_0 | fp16 scale d, 32 int8 q | d · q |
| Q4_0 | d, 16 bytes of nibbles q | d · (q − 8) |
| Q4_1 | d, fp16 m, 16 bytes | d · q + m |
| TQ2_0 | 64 bytes of pairs of bits q, d | d · (q − 1) |
| TQ1_0 | 52 bytes of digits q of base 3, d | d · (q − 1) |
| MXFP4 | e8m0 scale, 16 bytes of e2m1 | as OCP MX |

Byte i of 16 holds the numbers i and i + 16; byte i of each 32 of TQ2_0 holds i, i + 32, i + 64 and i + 96 of 128. Of
TQ1_0 the first 32 bytes hold 5 of 160 so, 32 apart, the next 16 5 of 80 and the last 4 4 of 16: 256/243 times the
number whose digits they are, the first counting 81, rounded up. A Weight whose codes and scales fit a type is
rearranged, and both stand for the same numbers, which holds for the way back too. Q4_1's m is seldom a whole multiple
of d, as zero points are: then a matrix is the sum of d · q and of m, a product of low rank whose right factor says to
which block a column belongs. Source: ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from parco.formats import (
    DTYPE_NAMES,
    E2M1,
    TERNARIES,
    TERNARY5,
    Format,
    Integer,
    ScaleAbsmax,
    ScaleAbsmean,
    ScaleE8M0,
    ScaleRange,
)
from parco.kernels.cast import pack, read_codes, unpack, write_codes
from parco.weights import Dense, LowRank, Quantized, Sum, Weight

if TYPE_CHECKING:
    import numpy

BLOCK = {"F32": 1, "F16": 1, "BF16": 1, "Q8_0": 32, "Q4_0": 32, "Q4_1": 32, "TQ2_0": 256, "TQ1_0": 256, "MXFP4": 32}
"""The types that are written, and the columns that share a block of each; a row is whole blocks."""

_DENSE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def type_of(spec: Weight) -> str:
    """The type that holds what `spec` stores, scales aside, which must be fp16 there. ValueError where none does."""
    if isinstance(spec, Dense):
        (values,) = spec.tensors().values()
        return _DENSE[values.dtype]
    if spec == _sum_of(spec.shape):
        return "Q4_1"
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
        case Integer() as element, ScaleAbsmean() if element in TERNARIES:
            return "TQ1_0" if element == TERNARY5 else "TQ2_0", "Q4_0"
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
    if isinstance(spec, Sum):
        codes, scale, zero, least, member = tensors.values()
        if bool(zero.any()) or not torch.equal(member, _membership(spec.shape)):
            raise ValueError(f"{spec} is of several parts, and GGML's types are of one")
        return _side_by_side(
            *(each[..., None].view(torch.uint8) for each in (scale, least)), _nibbles(unpack(codes, 4, spec.shape[1]))
        )
    assert isinstance(spec, Quantized)
    codes = read_codes(tensors["codes"], spec.format, spec.shape[1])
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
    if name in ("TQ1_0", "TQ2_0"):
        return _side_by_side(_pairs(codes) if name == "TQ2_0" else _digits(codes), stored)
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


_RUNS = ((32, 5), (16, 5), (4, 4))
"""Bytes of a block of TQ1_0 that hold as many digits, and how many."""


def _digits(codes: Tensor) -> Tensor:
    """uint8 [N, K] -> uint8 [N, K / 256, 52]."""
    blocks = codes.reshape(codes.shape[0], -1, 256).to(torch.int32)
    found: list[Tensor] = []
    start = 0
    for size, count in _RUNS:
        run = blocks[..., start : start + size * count].unflatten(-1, (count, size))
        number = (run * torch.tensor([81, 27, 9, 3, 1])[:count, None]).sum(-2)
        found.append((number * 256 + 242) // 243)
        start += size * count
    return torch.cat(found, dim=-1).to(torch.uint8)


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


def weight(data: Tensor, name: str, columns: int) -> tuple[Weight, tuple[Tensor, ...]]:
    """The Weight, and its tensors, of a matrix of K = `columns` whose rows are `data`, uint8 [N, bytes of a row], of
    the type `name`: the numbers that they stand for, exactly. ValueError for a type that is none of BLOCK.
    """
    rows = data.shape[0]
    if name in _DENSE.values():
        dtype = next(dtype for dtype, known in _DENSE.items() if known == name)
        return Dense((rows, columns), DTYPE_NAMES[dtype]), (data.contiguous().view(dtype),)
    if name not in _FORMATS:
        raise ValueError(f"it is of the type {name}, and parco reads {', '.join(BLOCK)}")
    blocks = data.reshape(rows, columns // BLOCK[name], -1)
    spec = Quantized(_FORMATS[name], (rows, columns))
    if name == "MXFP4":
        return spec, (pack(_of_nibbles(blocks[..., 1:]), 4), blocks[..., 0].contiguous())
    if name == "TQ2_0":
        return spec, (pack(_of_pairs(blocks[..., :64]), 2), _numbers(blocks[..., 64:]))
    if name == "TQ1_0":
        return spec, (write_codes(_of_digits(blocks[..., :52]), spec.format), _numbers(blocks[..., 52:]))
    scale = _numbers(blocks[..., :2])
    if name == "Q8_0":
        return spec, ((blocks[..., 2:] ^ 128).reshape(rows, columns), scale)
    codes = pack(_of_nibbles(blocks[..., -16:]), 4)
    return (spec, (codes, scale)) if name == "Q4_0" else _with_least(spec, codes, scale, _numbers(blocks[..., 2:4]))


_FORMATS = {
    "Q8_0": "int8:32:fp16",
    "Q4_0": "int4:32:fp16",
    "Q4_1": "int4:32:asym:fp16",
    "TQ2_0": "ternary:256:fp16",
    "TQ1_0": "ternary5:256:fp16",
    "MXFP4": "mxfp4",
}


def _with_least(spec: Quantized, codes: Tensor, scale: Tensor, least: Tensor) -> tuple[Weight, tuple[Tensor, ...]]:
    """Q4_1: with zero points where every m is −d times one, else as a sum."""
    zero = torch.nan_to_num(-least.float() / scale.float()).round().clamp(0, 255)
    if torch.equal(-zero * scale.float(), least.float()):
        return spec, (codes, scale, zero.to(torch.uint8))
    found, member = _sum_of(spec.shape), _membership(spec.shape)
    assert found is not None
    return found, (codes, scale, torch.zeros_like(zero, dtype=torch.uint8), least, member)


def _sum_of(shape: tuple[int, int]) -> Sum | None:
    """What Q4_1 is without zero points: codes from 0 on, and m by the block of a column."""
    rows, columns = shape
    if columns % BLOCK["Q4_1"]:
        return None
    blocks = columns // BLOCK["Q4_1"]
    by_block = LowRank(Dense((rows, blocks), "fp16"), Dense((blocks, columns), "fp16"))
    return Sum(Quantized(_FORMATS["Q4_1"], shape), by_block)


def _membership(shape: tuple[int, int]) -> Tensor:
    """fp16 [K / 32, K]: 1 where a column belongs to a block."""
    columns = torch.arange(shape[1])
    return (columns // BLOCK["Q4_1"] == columns[: shape[1] // BLOCK["Q4_1"], None]).to(torch.float16)


def _numbers(pairs: Tensor) -> Tensor:
    """uint8 [N, B, 2] -> fp16 [N, B]."""
    return pairs.contiguous().view(torch.float16)[..., 0].contiguous()


def _of_nibbles(halves: Tensor) -> Tensor:
    """uint8 [N, B, 16] -> uint8 [N, 32 B]."""
    return torch.stack((halves & 15, halves >> 4), 2).flatten(1)


def _of_pairs(parts: Tensor) -> Tensor:
    """uint8 [N, B, 64] -> uint8 [N, 256 B]."""
    bytes_of_half = parts.reshape(*parts.shape[:2], 2, 1, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    return ((bytes_of_half >> shifts) & 3).flatten(1)


def _of_digits(parts: Tensor) -> Tensor:
    """uint8 [N, B, 52] -> uint8 [N, 256 B]."""
    found: list[Tensor] = []
    for part, (_, count) in zip(parts.to(torch.int32).split([size for size, _ in _RUNS], -1), _RUNS, strict=True):
        found += [(part * 3**i % 256 * 3) >> 8 for i in range(count)]
    return torch.cat(found, dim=-1).to(torch.uint8).flatten(1)
