"""Panels: the layout in which the CPU's kernels read codes fastest.

By rows, a kernel that keeps one output to a lane has to turn 16 rows in registers before it can multiply. In a panel
of 16 rows the turning is done: dword d of the panel's 16 bit streams lie side by side, and a panel is one stream of
memory. Codes [N, B] become [⌈N/16⌉, B/4, 64] bytes, and scales and zeros [N, G], where every row has its own and more
than one, become [⌈N/16⌉, G, 16]; the last panel is filled with zeros. All else stays as it is.

A stream of 3, 5 or 6 bits a code is first cut into planes, 32 codes at a time: the low 2 bits of 3, or the low 4 bits,
of all 32 in a stream; then what is left, in the order in which kernels bring 4 codes to their bytes by one shift.

Bits only change places, so packing loses nothing and is undone before a file is written. Digits (ternary5) become the
bits of ternary, so that panels of both are the same, and become digits again.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from parco import _C
from parco.formats import Format, TensorSpec
from parco.kernels.cast import of_bits, packing, to_bits
from parco.kernels.library import untraced

PANEL_ROWS = 16
DWORD = 4
RUN = 32
"""Codes that are cut into planes together."""

COMPILED = True
"""Whether the CPU packs by compiled code."""

LOW = {3: 2, 5: 4, 6: 4}
"""Bits of a code -> those of the first plane, where there are planes."""


def is_packed(codes: Tensor) -> bool:
    """Whether these codes are panels."""
    return codes.ndim == 3


def _moved(format: Format, shape: tuple[int, int]) -> tuple[str, ...]:
    """Names of the tensors that have one value per row and group."""
    group = format.block.columns
    return ("scale", "zero") if format.block.rows == 1 and group is not None and group < shape[1] else ()


def specs(format: Format, shape: tuple[int, int]) -> dict[str, TensorSpec]:
    """Name, shape and dtype of the packed tensors of a matrix whose rows of codes are whole dwords."""
    count = -(-shape[0] // PANEL_ROWS)
    found = format.tensors(shape)
    moved = {
        name: TensorSpec((count, spec.shape[1], PANEL_ROWS), spec.dtype)
        for name, spec in found.items()
        if name in _moved(format, shape)
    }
    panel = TensorSpec((count, shape[1] * format.bits // 32, PANEL_ROWS * DWORD), found["codes"].dtype)
    return found | moved | {"codes": panel}


def pack(format: Format, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `Format.tensors` as panels. ValueError where a row is not whole dwords, or runs where there are
    planes.
    """
    if not fills(format.bits, shape[1]):
        raise ValueError(f"pack: a row of {shape[1]} codes of {format} is not cut into whole dwords")
    codes = to_bits(tensors["codes"], format, shape[1])
    packed = {name: _turned(tensors[name]) for name in _moved(format, shape) if name in tensors}
    return {**tensors, **packed, "codes": _panels(codes.contiguous(), format.bits, shape[1])}


def _panels(codes: Tensor, bits: int, columns: int) -> Tensor:
    """Codes by rows as panels: compiled on the CPU, in plain torch elsewhere."""
    rows = codes.shape[0]
    if COMPILED and untraced(codes):
        panels = codes.new_empty((-(-rows // PANEL_ROWS), columns * bits // 32, PANEL_ROWS * DWORD))
        _C.pack_codes(codes.data_ptr(), panels.data_ptr(), rows, columns, bits, torch.get_num_threads())
        return panels
    if bits in LOW:
        codes = _planes(packing.unpack(codes, bits, columns), bits)
    # A clone is aligned, which a view of dwords needs and a part of a file need not be.
    return _turned(codes.clone().view(torch.int32)).view(torch.uint8).flatten(2)


def unpack(format: Format, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `pack` was given."""
    plain = {name: _back(tensors[name], shape[0]) for name in _moved(format, shape) if name in tensors}
    codes = _rows(tensors["codes"].contiguous(), format.bits, shape)
    return {**tensors, **plain, "codes": of_bits(codes, format, shape[1])}


def _rows(panels: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """What `_panels` was given."""
    if COMPILED and untraced(panels):
        codes = panels.new_empty((shape[0], shape[1] * bits // 8))
        _C.unpack_codes(panels.data_ptr(), codes.data_ptr(), *shape, bits, torch.get_num_threads())
        return codes
    codes = _back(panels.clone().view(torch.int32), shape[0]).view(torch.uint8)
    return packing.pack(_without_planes(codes, bits), bits) if bits in LOW else codes


def fills(bits: int, columns: int) -> bool:
    """Whether `columns` codes fill what is packed together: dwords, or runs where there are planes."""
    return columns % (RUN if bits in LOW else 32 // bits) == 0


def _order(bits: int) -> list[int]:
    """The code of a run whose left bits are field f of the second plane."""
    low = LOW[bits]
    left, in_byte, in_dword = bits - low, 8 // low, 32 // low
    order: list[int] = []
    for field in range(RUN):
        dword, place = divmod(field * left, 32)
        byte, start = divmod(place, 8)
        vector = (dword * 8 + start) // left
        order.append(vector // in_byte * in_dword + byte * in_byte + vector % in_byte)
    return order


def _planes(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes [N, K] below 2**bits as rows of planes, [N, K·bits/8] bytes."""
    rows, columns = codes.shape
    runs, low = codes.reshape(-1, RUN), LOW[bits]
    first = packing.pack(runs & ((1 << low) - 1), low)
    second = packing.pack((runs >> low)[:, _order(bits)], bits - low)
    return torch.cat((first, second), dim=1).reshape(rows, columns * bits // 8)


def _without_planes(rows: Tensor, bits: int) -> Tensor:
    """The codes that `_planes` was given."""
    low, run_bytes = LOW[bits], RUN * bits // 8
    runs = rows.reshape(-1, run_bytes)
    first = packing.unpack(runs[:, : RUN * low // 8].contiguous(), low, RUN)
    second = packing.unpack(runs[:, RUN * low // 8 :].contiguous(), bits - low, RUN)
    codes = first.clone()
    codes[:, _order(bits)] |= second << low
    return codes.reshape(rows.shape[0], -1)


def _turned(matrix: Tensor) -> Tensor:
    """[N, K] as [⌈N/16⌉, K, 16], zero past the last row."""
    rows, columns = matrix.shape
    if rows % PANEL_ROWS:
        padded = matrix.new_zeros((-(-rows // PANEL_ROWS) * PANEL_ROWS, columns))
        padded[:rows] = matrix
        matrix = padded
    return matrix.view(-1, PANEL_ROWS, columns).transpose(1, 2).contiguous()


def _back(panels: Tensor, rows: int) -> Tensor:
    matrix = panels.transpose(1, 2).reshape(-1, panels.shape[1])
    return matrix.contiguous() if rows == matrix.shape[0] else matrix[:rows].clone()
