"""Panels: the layout in which the CPU's kernels read codes fastest.

By rows, a kernel that keeps one output to a lane has to turn 16 rows in registers before it can multiply. In a panel
of 16 rows the turning is done: dword d of the panel's 16 bit streams lie side by side, and a panel is one stream of
memory. Codes [N, B] become [⌈N/16⌉, B/4, 64] bytes, and scales and zeros [N, G], where every row has its own and more
than one, become [⌈N/16⌉, G, 16]; the last panel is filled with zeros. All else stays as it is. The bytes are the same,
so packing loses nothing and is undone before a file is written.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from parco.formats import Format, TensorSpec

PANEL_ROWS = 16
DWORD = 4


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
    codes = found["codes"]
    panel = TensorSpec((count, codes.shape[1] // DWORD, PANEL_ROWS * DWORD), codes.dtype)
    return found | moved | {"codes": panel}


def pack(format: Format, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `Format.tensors` as panels. ValueError where a row of codes is not whole dwords."""
    codes = tensors["codes"]
    if codes.shape[1] % DWORD:
        raise ValueError(f"pack: rows of {format} are {codes.shape[1]} bytes at {shape[1]} columns; dwords are packed")
    # A clone is aligned, which a view of dwords needs and a part of a file need not be.
    dwords = _turned(codes.clone(memory_format=torch.contiguous_format).view(torch.int32))
    packed = {name: _turned(tensors[name]) for name in _moved(format, shape) if name in tensors}
    return {**tensors, **packed, "codes": dwords.view(torch.uint8).flatten(2)}


def unpack(format: Format, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `pack` was given."""
    codes = tensors["codes"].view(torch.int32)
    plain = {name: _back(tensors[name], shape[0]) for name in _moved(format, shape) if name in tensors}
    return {**tensors, **plain, "codes": _back(codes, shape[0]).view(torch.uint8)}


def _turned(matrix: Tensor) -> Tensor:
    """[N, K] as [⌈N/16⌉, K, 16], zero past the last row."""
    rows, columns = matrix.shape
    if rows % PANEL_ROWS:
        padded = matrix.new_zeros((-(-rows // PANEL_ROWS) * PANEL_ROWS, columns))
        padded[:rows] = matrix
        matrix = padded
    return matrix.view(-1, PANEL_ROWS, columns).transpose(1, 2).contiguous()


def _back(panels: Tensor, rows: int) -> Tensor:
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:rows].contiguous()
