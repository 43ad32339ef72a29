"""What the two sparse products share: their arguments, what is checked of them, and their derivative."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parco import _C, machine
from parco.formats import Format
from parco.kernels.cast import to_bits
from parco.kernels.cast.codes import check_given
from parco.kernels.cast.decoding import layout
from parco.kernels.library import TYPES, check_float, differentiate, number_of_scales

EXPANDED = 1 << 24
"""Numbers of W that the backward pass holds in fp32 at a time."""


class SparseCall(NamedTuple):
    """One call of a sparse product: `rows` x of `dtype` against `outputs` by `columns` numbers, of which every row
    keeps `kept` in `format`; `block` is the side of blocks, 1 where a mask says which numbers are kept.
    """

    device: str
    isa: str
    dtype: torch.dtype
    rows: int
    outputs: int
    columns: int
    kept: int
    block: int
    format: str

    def __str__(self) -> str:
        blocks = f" in blocks of {self.block}" if self.block > 1 else ""
        return (
            f"{self.rows} rows of {self.dtype} x {self.format} {self.outputs}x{self.columns}, {self.kept} kept of "
            f"each row{blocks}, {torch.get_num_threads()} threads"
            f"{', digits written as bits first' if _digits(self.format) else ''}"
        )


def describe(x: Tensor, values: Tensor, format: str, columns: int, kept: int, block: int) -> SparseCall:
    """The table's key of a call."""
    rows = x.numel() // columns if columns else 0
    return SparseCall(x.device.type, machine.isa(), x.dtype, rows, values.shape[0], columns, kept, block, format)


def check(
    operation: str,
    x: Tensor,
    values: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    bias: Tensor | None,
    format: str,
    columns: int,
    kept: int,
) -> None:
    """Raise ValueError or TypeError, naming the argument, unless these fit together."""
    check_float(operation, "x", x)
    if columns < 1 or kept < 1:
        raise ValueError(f"{operation}: columns={columns} of which {kept} are kept; at least one is needed")
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(f"{operation}: x has the shape {tuple(x.shape)}; its last dimension must be columns={columns}")
    if values.ndim != 2:
        raise ValueError(f"{operation}: values has the shape {tuple(values.shape)}; a matrix is needed")
    form = Format.parse(format)
    shape = (values.shape[0], kept)
    given = {"values" if form.is_dense else "codes": values, "scale": scale, "zero": zero, "global_scale": global_scale}
    check_given(given, form.tensors(shape), operation, f"format {format} of {shape[0]}x{kept}")
    if bias is not None:
        check_float(operation, "bias", bias)
        if tuple(bias.shape) != (shape[0],):
            raise ValueError(f"{operation}: bias has the shape {tuple(bias.shape)}; [{shape[0]}] is needed")


@functools.cache
def codes(format: str, kept: int, scale_dtype: torch.dtype | None) -> _C.SparseCodes | None:
    """What the compiled kernels know of a format's codes, `kept` to a row; None for a dense format."""
    form = Format.parse(format)
    if form.is_dense:
        return None
    return _C.SparseCodes(
        block_rows=form.block.rows or 1 << 62,
        scale_type=number_of_scales(form, scale_dtype),
        **layout(form, kept),
    )


@functools.cache
def _digits(format: str) -> Format | None:
    """The format, where its rows are digits, which are written as bits before a kernel reads them."""
    form = Format.parse(format)
    return form if form.per_byte else None


def compiled(kernel: Callable[..., int], name: str) -> Callable[..., Tensor]:
    """A compiled kernel as a function of the operation's arguments."""

    def run(
        x: Tensor,
        values: Tensor,
        scale: Tensor | None,
        zero: Tensor | None,
        global_scale: Tensor | None,
        where: Tensor,
        bias: Tensor | None,
        format: str,
        columns: int,
        size: int,
    ) -> Tensor:
        # Names are held until the kernel returns: the addresses are of these tensors.
        x, values, where = x.contiguous(), values.contiguous(), where.contiguous()
        scale, zero, bias = (None if each is None else each.contiguous() for each in (scale, zero, bias))
        block = 0 if where.dtype == torch.uint8 else size
        kept = where.shape[1] * block if block else size
        outputs = values.shape[0]
        digits = _digits(format)
        if digits is not None:
            values = to_bits(values, digits, kept)
        y = x.new_empty((*x.shape[:-1], outputs))
        stored = codes(format, kept, None if scale is None else scale.dtype)
        wrong = kernel(
            stored,
            x.data_ptr(),
            values.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            0 if zero is None else zero.data_ptr(),
            0 if global_scale is None else global_scale.data_ptr(),
            where.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            x.numel() // columns,
            outputs,
            columns,
            kept,
            block,
            where.itemsize,
            TYPES[x.dtype],
            TYPES[values.dtype] if stored is None else 0,
            0 if bias is None else TYPES[bias.dtype],
            torch.get_num_threads(),
        )
        if wrong >= 0:
            band, at = divmod(wrong, where.shape[1])
            raise IndexError(
                f"{name}: blocks[{band}, {at}] is {int(where[band, at])}; each row must ascend within 0 to "
                f"{-(-columns // block) - 1}, as {columns} columns are {-(-columns // block)} blocks of {block}"
            )
        return y

    return run


STREAMED_ROWS = 8
"""Rows of x up to which the kept numbers are read from memory once, and beyond which matrices are expanded in the
cache (`parco::sparse::streamed_rows`).
"""


def refuses(call: SparseCall) -> str | None:
    """Why no compiled kernel runs a call, or None."""
    return "there are no rows or no outputs" if call.rows == 0 or call.outputs == 0 else None


def refuses_many(call: SparseCall) -> str | None:
    """As `refuses`, of kernels that only read from memory."""
    if call.rows > STREAMED_ROWS:
        return f"{call.rows} rows repay the whole matrix with its zeros; it serves up to {STREAMED_ROWS}"
    return refuses(call)


def _parts(format: str, outputs: int, columns: int, unit: int) -> Iterator[slice]:
    """Rows of W in parts of about EXPANDED numbers that cut no `unit` of rows, or all where rows share scales."""
    height = Format.parse(format).block.rows
    dense = Format.parse(format).is_dense
    step = max(1, EXPANDED // columns // unit) * unit if dense or height == 1 else outputs
    return (slice(first, min(first + step, outputs)) for first in range(0, outputs, step))


def differentiate_sparse(name: str, dense: Callable[..., Tensor], unit: Callable[[int], int]) -> None:
    """Register the derivative of an operation: grad_x = grad @ W with W as `dense` has it, some rows at a time, and
    grad_bias = the sum of grad over rows. `unit(size)` rows share a row of what says where the kept numbers stand.
    """

    def needs(*inputs: Any) -> bool:
        return any(tensor is not None and tensor.requires_grad for tensor in (inputs[0], inputs[6]))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, values, scale, zero, global_scale, where, bias, ctx.format, ctx.columns, ctx.size = inputs
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(values, scale, zero, global_scale, where)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, scale, zero, global_scale, where = ctx.saved_tensors
        wide = grad.float()
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            total = wide.new_zeros((*wide.shape[:-1], ctx.columns))
            height, outputs = unit(ctx.size), values.shape[0]
            for rows in _parts(ctx.format, outputs, ctx.columns, height):
                cut = rows != slice(0, outputs)
                scales = (None if each is None else each[rows] if cut else each for each in (scale, zero))
                own = where[rows.start // height : -(-rows.stop // height)]
                weight = dense((values[rows], *scales, global_scale), own, ctx.format, ctx.columns, ctx.size)
                total += wide[..., rows] @ weight
            grad_x = total.to(ctx.x_dtype)
        if ctx.needs_input_grad[6]:
            grad_bias = wide.reshape(-1, wide.shape[-1]).sum(0).to(ctx.bias_dtype)
        return (grad_x, None, None, None, None, None, grad_bias, None, None, None)

    differentiate(name, needs, setup, backward)
