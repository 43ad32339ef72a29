"""The derivative of products with stored codes: that of the product with the matrix they stand for."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parco.kernels.activations import NONE
from parco.kernels.library import differentiate
from parco.kernels.linear import epilogue, reference
from parco.kernels.linear.panels import PANEL_ROWS, is_packed
from parco.kernels.linear.storage import rows_of, storage

EXPANDED = 1 << 20
"""Numbers of W that the backward pass holds in fp32 at a time, so that they are multiplied while they are in the cache:
for 512 rows 1.1 times as fast as the whole of 11 million at once.
"""


REQUIRED = 9
"""Arguments of `linear_coded` without its epilogue."""


def times_matrix(grad: Tensor, tensors: tuple[Tensor | None, ...], format: str, columns: int, outputs: int) -> Tensor:
    """grad [..., N] @ W in fp32, some rows of W expanded at a time."""
    codes, scale, zero, global_scale = tensors
    assert codes is not None
    flat = grad.reshape(-1, grad.shape[-1])
    total = grad.new_zeros((flat.shape[0], columns))
    height = storage(format).format.block.rows or 1
    packed, count = is_packed(codes), rows_of(codes, outputs)
    unit = math.lcm(height, PANEL_ROWS if packed else 1)
    step = max(1, EXPANDED // columns // unit) * unit
    for first in range(0, count, step):
        last = min(first + step, count)
        if height > 1:  # looked up, these would decode all rows for some
            part = slice(first // height, -(-last // height))
            scales = (None if scale is None else scale[part], None if zero is None else zero[part])
            part = slice(first // PANEL_ROWS, -(-last // PANEL_ROWS)) if packed else slice(first, last)
            weight = reference.dense(codes[part], *scales, global_scale, format, columns, last - first)
        else:
            rows = torch.arange(first, last, device=codes.device)
            weight = torch.ops.parco.embedding_coded(
                rows, codes, scale, zero, global_scale, format, columns, torch.float32, outputs
            )
        total.addmm_(flat[:, first:last], weight)
    return total.view(*grad.shape[:-1], columns)


def _needs_grad(*inputs: Any) -> bool:
    _, addend = epilogue.given(inputs, REQUIRED)
    return any(tensor is not None and tensor.requires_grad for tensor in (inputs[0], inputs[5], addend))


def differentiate_coded(name: str) -> None:
    """Register the derivative of an operation of `linear_coded`'s arguments: grad_x = grad @ W with W expanded in fp32
    from the same codes, grad_bias = the sum of grad over rows, grad_addend = grad. Before an activation grad is
    multiplied by its slope, where it was applied: the product is computed again for that.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *stored, bias, ctx.format, ctx.columns, ctx.outputs = inputs[:REQUIRED]
        ctx.activation, addend = epilogue.given(inputs, REQUIRED)
        ctx.given = len(inputs)
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        ctx.addend_dtype = None if addend is None else addend.dtype
        ctx.save_for_backward(*stored, *((x, bias) if ctx.activation != NONE else ()))

    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = (*ctx.needs_input_grad, False, False)
        saved = ctx.saved_tensors  # asked for once: a checkpoint hands them out once
        tensors, operands = saved[:4], saved[4:]
        grad_x = grad_bias = None
        wide = grad.float()
        grad_addend = grad.to(ctx.addend_dtype) if ctx.addend_dtype is not None and needs[10] else None
        if operands:
            x, bias = operands
            product = getattr(torch.ops.parco, name).default
            before = product(x.float(), *tensors, bias, ctx.format, ctx.columns, ctx.outputs)
            wide = epilogue.through(wide, before, ctx.activation)
        if needs[0]:
            grad_x = times_matrix(wide, tensors, ctx.format, ctx.columns, ctx.outputs).to(ctx.x_dtype)
        if needs[5]:
            grad_bias = wide.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        found = (grad_x, None, None, None, None, grad_bias, None, None, None, None, grad_addend)
        return found[: ctx.given]

    differentiate(name, _needs_grad, setup, backward)
