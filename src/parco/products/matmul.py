"""matmul: one product of matrices, in the way that is asked for."""

from typing import Any

import torch
from torch import Tensor

from parco.kernels.linear import rounded_to_int8
from parco.products.how import Activations, Native, Product, parse
from parco.products.split import split_matmul


def matmul(a: Tensor, b: Tensor, how: Product | str = Native()) -> Tensor:  # noqa: B008
    """a [..., M, K] @ b [..., K, N] -> [..., M, N], leading dimensions broadcast, in the dtype of the operands.

    `how` is a Product or its text: `Native()` is torch's own; `Split(3)` multiplies bf16 words and is of fp32 grade
    (operands in bf16 or fp16 are widened, the result rounded back); `Activations()` rounds the rows of `a` to int8 and
    multiplies in fp32. Differentiable; gradients are computed the same way, but for that rounding, which they pass
    straight through. `certificate` says how wrong the result can be.

    Raises ValueError for operands without a common inner dimension, TypeError for dtypes that differ or that `how`
    does not take.
    """
    how = parse(how)
    if a.dim() < 2 or b.dim() < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"a is {tuple(a.shape)}, b is {tuple(b.shape)}: needs [..., M, K] and [..., K, N]")
    if a.dtype != b.dtype:
        raise TypeError(f"a is {a.dtype}, b is {b.dtype}: both must have one dtype")
    if isinstance(how, Native):
        return torch.matmul(a, b)
    if a.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"a and b are {a.dtype}: {how} takes float32, bfloat16 or float16 (fp32 grade at most)")
    if isinstance(how, Activations):
        rounded: Any = _Rounded.apply(a)
        return torch.matmul(rounded, b.to(torch.float32)).to(a.dtype)
    return split_matmul(a.to(torch.float32), b.to(torch.float32), how).to(a.dtype)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.dtype = a.dtype
        return rounded_to_int8(a)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0].to(ctx.dtype)
