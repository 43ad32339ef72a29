"""The kernels as functions of the operations' arguments, and what they refuse."""

import functools

import torch
from torch import Tensor

from parco.formats import Element, Format, Integer, Table
from parco.kernels.cast.hadamard import signs
from parco.kernels.cast.rounding import from_codes
from parco.kernels.cast.triton.form import form_of
from parco.kernels.library import TYPES
from parco.kernels.triton import bits_of, power_of_two, run

LONGEST_ROW = 1 << 15
"""Columns of which one program holds the whole row."""
TILE = 4096
"""Numbers that a program casts, where blocks leave the choice."""
SIDE = 64
"""Rows and columns of a tile that is cast both ways, where blocks and transforms leave the choice."""


def refuses_rows(format: str, dtype: torch.dtype, columns: int) -> str | None:
    """Why cast_rows is left to the reference, or None."""
    if reason := refuses_codes(format, dtype):
        return reason
    group = min(Format.parse(format).block.columns or columns, columns)
    if group > LONGEST_ROW:
        return f"one program holds {LONGEST_ROW} columns of a block, not {group}"
    return None if group == columns or group & (group - 1) == 0 else f"groups of {group} columns are no power of two"


def refuses_both(format: str, dtype: torch.dtype) -> str | None:
    """Why cast_both is left to the reference, or None."""
    group = Format.parse(format).block.columns
    if group is None or group > 128:
        return f"a tile has 128 columns, a block {group or 'a whole row'}"
    return refuses_codes(format, dtype)


def refuses_codes(format: str, dtype: torch.dtype) -> str | None:
    """Why a cast is left to the reference, or None."""
    if isinstance(Format.parse(format).element, Table):
        return "it rounds to no table"
    return refuses_digits(format) or refuses_dtype(dtype)


def refuses_digits(format: str) -> str | None:
    """Why codes that are no streams of bits are left to the reference, or None."""
    per_byte = Format.parse(format).per_byte
    return f"its codes are bits, not {per_byte} digits to a byte" if per_byte else None


def refuses_dtype(dtype: torch.dtype) -> str | None:
    """Why numbers of a dtype are left to the reference, or None."""
    return None if dtype in TYPES else f"it knows no {dtype}"


def cast_rows(x: Tensor, global_scale: Tensor | None, format: str, rounding: str, seed: int) -> tuple[Tensor, Tensor]:
    """As the operation."""
    from parco.kernels.cast.triton import tiles

    x = x.contiguous()
    (rows, columns), form = x.shape, Format.parse(format)
    codes, scale = _new(x, form, (rows, columns))
    group = form.block.columns
    block = power_of_two(columns) if group is None or group >= columns else group
    width = max(block, min(256, power_of_two(columns)))
    height = max(1, min(TILE // width, power_of_two(rows)))
    run(
        tiles.cast_rows,
        (rows, columns),
        (height, width),
        x,
        codes,
        bits_of(scale),
        x if global_scale is None else global_scale,
        rows,
        columns,
        codes.shape[1],
        scale.shape[1],
        seed,
        FORM=form_of(format, rounding),
        E4M3=form_of("fp8_e4m3"),
        G=block,
    )
    return codes, scale


def cast_both(
    x: Tensor,
    global_scale: Tensor | None,
    transposed_scale: Tensor | None,
    format: str,
    rounding: str,
    seed: int,
    straight: bool,
    transposed: bool,
    row_size: int,
    column_size: int,
    sign_seed: int,
) -> list[Tensor]:
    """As the operation."""
    from parco.kernels.cast.triton import tiles

    x = x.contiguous()
    (rows, columns), form = x.shape, Format.parse(format)
    by_rows = _new(x, form, (rows, columns)) if straight else (x, x)
    by_columns = _new(x, form, (columns, rows)) if transposed else (x, x)
    group, size = form.block.columns, row_size or column_size
    assert group is not None
    height = max(SIDE, group if transposed else 0, column_size)
    width = max(SIDE, group if straight else 0, row_size)
    run(
        tiles.cast_both,
        (rows, columns),
        (height, width),
        x,
        by_rows[0],
        bits_of(by_rows[1]),
        x if global_scale is None else global_scale,
        by_columns[0],
        bits_of(by_columns[1]),
        x if transposed_scale is None else transposed_scale,
        _signs(size, sign_seed % (1 << 64), x.device) if size else x,
        rows,
        columns,
        by_rows[0].shape[1],
        by_rows[1].shape[1],
        by_columns[0].shape[1],
        by_columns[1].shape[1],
        seed,
        FORM=form_of(format, rounding),
        E4M3=form_of("fp8_e4m3"),
        G=group,
        STRAIGHT=straight,
        TURNED=transposed,
        ROW_SIZE=row_size,
        COLUMN_SIZE=column_size,
    )
    return [*(by_rows if straight else ()), *(by_columns if transposed else ())]


def cast_codes(
    x: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    rounding: str,
    seed: int,
) -> Tensor:
    """As the operation."""
    from parco.kernels.cast.triton import tiles

    x = x.contiguous()
    (rows, columns), form = x.shape, Format.parse(format)
    spec = form.tensors((rows, columns))["codes"]
    codes = torch.empty(spec.shape, dtype=spec.dtype, device=x.device)
    width = min(256, power_of_two(columns))
    height = max(1, min(TILE // width, power_of_two(rows)))
    run(
        tiles.cast_codes,
        (rows, columns),
        (height, width),
        x,
        x if scale is None else bits_of(scale.contiguous()),
        x if zero is None else zero.contiguous(),
        x if global_scale is None else global_scale,
        codes,
        rows,
        columns,
        *_blocks(form, rows, columns, scale),
        seed=seed,
        FORM=form_of(format, rounding),
    )
    return codes


def decode_codes(
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """As the operation."""
    from parco.kernels.cast.triton import tiles

    codes = codes.contiguous()
    rows, form = codes.shape[0], Format.parse(format)
    y = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    width = min(256, power_of_two(columns))
    height = max(1, min(TILE // width, power_of_two(rows)))
    run(
        tiles.decode_codes,
        (rows, columns),
        (height, width),
        codes,
        codes if scale is None else bits_of(scale.contiguous()),
        codes if zero is None else zero.contiguous(),
        codes if global_scale is None else global_scale,
        codes if isinstance(form.element, Integer) else _values(form.element, codes.device),
        bits_of(y),
        rows,
        columns,
        *_blocks(form, rows, columns, scale),
        FORM=form_of(format),
    )
    return y


def _new(x: Tensor, form: Format, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    specs = form.tensors(shape)
    codes, scale = (torch.empty(specs[n].shape, dtype=specs[n].dtype, device=x.device) for n in ("codes", "scale"))
    return codes, scale


def _blocks(form: Format, rows: int, columns: int, scale: Tensor | None) -> tuple[int, int, int, int]:
    """Rows and columns of a block, bytes of a row of codes, scales of a row of blocks."""
    bytes_of_row = form.tensors((rows, columns))["codes"].shape[1]
    stride = 0 if scale is None else scale.shape[1]
    return form.block.rows or max(rows, 1), min(form.block.columns or columns, columns), bytes_of_row, stride


@functools.cache
def _values(element: Element, device: torch.device) -> Tensor:
    """The number of each code, fp32."""
    return from_codes(torch.arange(1 << element.bits, device=device), element)


@functools.lru_cache(maxsize=256)
def _signs(size: int, seed: int, device: torch.device) -> Tensor:
    return signs(size, seed).to(device)
