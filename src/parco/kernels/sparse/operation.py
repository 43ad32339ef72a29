"""What the two sparse products share: their arguments, what is checked of them, and their derivative."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parco import machine
from parco.formats import Format
from parco.kernels.cast.codes import check_given
from parco.kernels.library import check_float, differentiate

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
