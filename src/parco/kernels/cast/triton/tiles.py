# pyright: basic, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false
# What pyright sees of Triton's functions is Python that never runs.
"""The kernels: tiles of a matrix cast by rows, by rows and by columns, under scales that are there, and back."""

import triton
import triton.language as tl

from parco.kernels.cast.triton.numbers import (
    bf16_bits,
    cast_tile,
    rescaled,
    rounded_codes,
    scale_number,
    store_codes,
    transformed,
)

UNSPECIALISED = ("seed", "rows", "row_bytes", "scale_stride", "turned_row_bytes", "turned_scale_stride")
"""Numbers that kernels are not compiled anew for."""


@triton.jit
def _place(columns, R: tl.constexpr, C: tl.constexpr):
    """First row and first column of this program's tile."""
    tiles = tl.cdiv(columns, C)
    program = tl.program_id(0)
    return (program // tiles).to(tl.int64) * R, (program % tiles).to(tl.int64) * C


@triton.jit
def _load(x_ptr, row, rows, column, columns):
    """Numbers of rows and columns, fp32, zeros outside the matrix."""
    valid = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(x_ptr + row[:, None] * columns + column[None, :], mask=valid, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=UNSPECIALISED)
def cast_rows(
    x_ptr,
    codes_ptr,
    scale_ptr,
    factor_ptr,
    rows,
    columns,
    row_bytes,
    scale_stride,
    seed: tl.int64,
    FORM: tl.constexpr,
    E4M3: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """A tile [R, C] of x, one scale for every G of a row."""
    first_row, first = _place(columns, R, C)
    row = first_row + tl.arange(0, R)
    x = _load(x_ptr, row, rows, first + tl.arange(0, C), columns)
    cast_tile(
        x,
        codes_ptr,
        scale_ptr,
        factor_ptr,
        row,
        rows,
        first,
        columns,
        row_bytes,
        scale_stride,
        seed,
        FORM,
        E4M3,
        G,
        R,
        C,
    )


@triton.jit(do_not_specialize=UNSPECIALISED)
def cast_both(
    x_ptr,
    codes_ptr,
    scale_ptr,
    factor_ptr,
    turned_codes_ptr,
    turned_scale_ptr,
    turned_factor_ptr,
    signs_ptr,
    rows,
    columns,
    row_bytes,
    scale_stride,
    turned_row_bytes,
    turned_scale_stride,
    seed: tl.int64,
    FORM: tl.constexpr,
    E4M3: tl.constexpr,
    G: tl.constexpr,
    STRAIGHT: tl.constexpr,
    TURNED: tl.constexpr,
    ROW_SIZE: tl.constexpr,
    COLUMN_SIZE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """A tile [R, C] of x by rows, and its transpose by rows, from one read."""
    first_row, first = _place(columns, R, C)
    row, column = first_row + tl.arange(0, R), first + tl.arange(0, C)
    x = _load(x_ptr, row, rows, column, columns)
    if STRAIGHT:
        numbers = x
        if ROW_SIZE > 0:
            numbers = transformed(x, signs_ptr, ROW_SIZE, R, C)
        cast_tile(
            numbers,
            codes_ptr,
            scale_ptr,
            factor_ptr,
            row,
            rows,
            first,
            columns,
            row_bytes,
            scale_stride,
            seed,
            FORM,
            E4M3,
            G,
            R,
            C,
        )
    if TURNED:
        turned = tl.trans(x)
        if COLUMN_SIZE > 0:
            turned = transformed(turned, signs_ptr, COLUMN_SIZE, C, R)
        cast_tile(
            turned,
            turned_codes_ptr,
            turned_scale_ptr,
            turned_factor_ptr,
            column,
            columns,
            first_row,
            rows,
            turned_row_bytes,
            turned_scale_stride,
            seed,
            FORM,
            E4M3,
            G,
            C,
            R,
        )


@triton.jit
def _block(row, column, block_rows, group, scale_stride):
    """Where the scales of rows and columns lie."""
    return (row // block_rows)[:, None] * scale_stride + (column // group)[None, :]


@triton.jit(do_not_specialize=UNSPECIALISED)
def cast_codes(
    x_ptr,
    scale_ptr,
    zero_ptr,
    factor_ptr,
    codes_ptr,
    rows,
    columns,
    block_rows,
    group,
    row_bytes,
    scale_stride,
    seed: tl.int64,
    FORM: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """A tile [R, C] of x under scales that are there."""
    first_row, first = _place(columns, R, C)
    row = first_row + tl.arange(0, R)
    column = first + tl.arange(0, C)
    x = _load(x_ptr, row, rows, column, columns)
    valid = (row < rows)[:, None] & (column < columns)[None, :]
    block = _block(row, column, block_rows, group, scale_stride)
    factor, zero, stored = x, 0, x
    if FORM.scale == "e4m3":
        factor = tl.load(factor_ptr)
    if FORM.is_asymmetric:
        zero = tl.load(zero_ptr + block, mask=valid, other=0).to(tl.int32)
    if FORM.scale != "none":
        stored = tl.load(scale_ptr + block, mask=valid, other=0)
    codes = rounded_codes(rescaled(x, stored, factor, FORM), zero, seed, row, first, FORM, R, C)
    store_codes(codes, codes_ptr, row, rows, first, columns, row_bytes, FORM, R, C)


@triton.jit(do_not_specialize=UNSPECIALISED)
def decode_codes(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    factor_ptr,
    values_ptr,
    y_ptr,
    rows,
    columns,
    block_rows,
    group,
    row_bytes,
    scale_stride,
    FORM: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """A tile [R, C] of the numbers that codes stand for; bf16 as its bits."""
    first_row, first = _place(columns, R, C)
    row, column = first_row + tl.arange(0, R), first + tl.arange(0, C)
    valid = (row < rows)[:, None] & (column < columns)[None, :]
    bit = column * FORM.bits
    at = codes_ptr + row[:, None] * row_bytes + (bit // 8)[None, :]
    code = tl.load(at, mask=valid, other=0).to(tl.int32)
    if 8 % FORM.bits != 0:  # a code may reach into the next byte
        further = valid & (bit // 8 + 1 < row_bytes)[None, :]
        code |= tl.load(at + 1, mask=further, other=0).to(tl.int32) << 8
    code = (code >> (bit % 8).to(tl.int32)[None, :]) & ((1 << FORM.bits) - 1)
    block = _block(row, column, block_rows, group, scale_stride)
    if FORM.is_asymmetric:
        number = code.to(tl.float32) - tl.load(zero_ptr + block, mask=valid, other=0).to(tl.float32)
    elif FORM.kind == "integer":
        number = (code - FORM.offset).to(tl.float32)
    else:
        number = tl.load(values_ptr + code)
    if FORM.scale != "none":
        factor = number
        if FORM.scale == "e4m3":
            factor = tl.load(factor_ptr)
        number *= scale_number(tl.load(scale_ptr + block, mask=valid, other=0), factor, FORM)
    at = y_ptr + row[:, None] * columns + column[None, :]
    if y_ptr.dtype.element_ty == tl.int16:
        tl.store(at, bf16_bits(number), mask=valid)
    else:
        tl.store(at, number.to(y_ptr.dtype.element_ty), mask=valid)
