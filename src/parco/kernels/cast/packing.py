"""Packing: codes of 1 to 8 bits in a stream of bytes, lowest bit first, each row beginning on a byte.

Eight codes of b bits fill exactly b bytes, so a row is packed in groups of eight: shifted into one 64-bit word, of
which the low b bytes are kept (little-endian, as every platform of torch is). Where b divides 8 a byte holds whole
codes and needs no word. Unused bits at a row's end are zero.

A Format stores codes so, or as digits of base 3, five to a byte, the first counting 1. Kernels read and write bits
alone. The bytes 243 to 255, which nothing writes, are read as 0 to 12, so that a file of any bytes stands for numbers.
"""

import torch
from torch import Tensor

from parco import _C
from parco.formats import Format
from parco.kernels.library import untraced

GROUP = 8
BASE = 3
"""Of the digits that share a byte."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Bytes of `codes` (uint8 [N, K], each below 2**bits): uint8 [N, ceil(K*bits/8)]. ValueError for bits outside 1
    to 8.
    """
    _check(bits)
    if bits == 8:
        return codes.contiguous()
    rows, columns = codes.shape
    nbytes = -(-columns * bits // 8)
    if 8 % bits == 0:
        parts = _pad(codes, 8 // bits).unbind(-1)
        packed = parts[0].clone()
        for index, part in enumerate(parts[1:], start=1):
            packed |= part << (index * bits)
        return packed
    groups = _pad(codes, GROUP)
    words = torch.zeros(rows, groups.shape[1], 1, dtype=torch.int64, device=codes.device)
    for index in range(GROUP):
        words |= groups[..., index : index + 1].to(torch.int64) << (index * bits)
    stream = words.view(torch.uint8)[..., :bits]
    return stream.reshape(rows, groups.shape[1] * bits)[:, :nbytes].contiguous()


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The codes that `pack` packed: uint8 [N, columns] from uint8 [N, ceil(columns*bits/8)]."""
    _check(bits)
    if bits == 8:
        return packed
    rows = packed.shape[0]
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        parts = [(packed >> shift) & mask for shift in range(0, 8, bits)]
        return torch.stack(parts, dim=-1).reshape(rows, packed.shape[1] * len(parts))[:, :columns]
    groups = -(-columns // GROUP)
    stream = packed.new_zeros(rows, groups * bits)
    stream[:, : packed.shape[1]] = packed
    wide = packed.new_zeros(rows, groups, 8)
    wide[..., :bits] = stream.reshape(rows, groups, bits)
    words = wide.view(torch.int64).reshape(rows, groups)
    codes = packed.new_empty(rows, groups, GROUP)
    for index in range(GROUP):
        codes[..., index] = (words >> (index * bits)) & mask
    return codes.reshape(rows, groups * GROUP)[:, :columns]


def write_codes(codes: Tensor, form: Format) -> Tensor:
    """`codes` (uint8 [N, K]) as `form` stores them: uint8 [N, form.row_bytes(K)]."""
    if not form.per_byte:
        return pack(codes, form.bits)
    digits = _pad(codes, form.per_byte).unbind(-1)
    stored = digits[0].clone()
    for index, digit in enumerate(digits[1:], start=1):
        stored += digit * BASE**index
    return stored


def read_codes(stored: Tensor, form: Format, columns: int) -> Tensor:
    """The codes that `write_codes` wrote: uint8 [N, columns]."""
    if not form.per_byte:
        return unpack(stored, form.bits, columns)
    left = stored % BASE**form.per_byte
    digits = [left // BASE**index % BASE for index in range(form.per_byte)]
    return torch.stack(digits, dim=-1).flatten(1)[:, :columns]


def to_bits(stored: Tensor, form: Format, columns: int) -> Tensor:
    """Stored rows of `columns` codes as streams of bits, which kernels read: the same tensor unless they are digits."""
    if not form.per_byte:
        return stored
    if not untraced(stored):
        return pack(read_codes(stored, form, columns), form.bits)
    assert stored.shape[1] == form.row_bytes(columns)
    stored = stored.contiguous()
    bits = stored.new_empty(stored.shape[0], form.bit_bytes(columns))
    _C.digits_to_bits(stored.data_ptr(), bits.data_ptr(), len(stored), columns, torch.get_num_threads())
    return bits


def of_bits(bits: Tensor, form: Format, columns: int) -> Tensor:
    """Rows of bits, of codes below the base, as `form` stores them: what `to_bits` was given."""
    if not form.per_byte:
        return bits
    if not untraced(bits):
        return write_codes(unpack(bits, form.bits, columns), form)
    assert bits.shape[1] == form.bit_bytes(columns)
    bits = bits.contiguous()
    stored = bits.new_empty(bits.shape[0], form.row_bytes(columns))
    _C.bits_to_digits(bits.data_ptr(), stored.data_ptr(), len(bits), columns, torch.get_num_threads())
    return stored


def _pad(codes: Tensor, multiple: int) -> Tensor:
    """[N, K] -> [N, ceil(K / multiple), multiple], zeros at the end."""
    rows, columns = codes.shape
    extra = -columns % multiple
    if extra:
        codes = torch.nn.functional.pad(codes, (0, extra))
    return codes.reshape(rows, (columns + extra) // multiple, multiple)


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}: codes of 1 to 8 bits can be packed")
