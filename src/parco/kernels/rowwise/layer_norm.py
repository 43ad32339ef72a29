"""layer_norm: y = (x − mean(x)) / sqrt(variance(x) + epsilon) * weight + bias (Ba et al., arXiv 1607.06450)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parco import _C
from parco.kernels import table
from parco.kernels.library import LIBRARY, TYPES, differentiate, undispatched
from parco.kernels.rowwise.norm_backward import norm_backward
from parco.kernels.rowwise.shapes import check_columns, check_result, describe, refuses


def check(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, dtype: torch.dtype | None = None) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit together."""
    check_columns("layer_norm", x, weight=weight, bias=bias)
    check_result("layer_norm", "dtype", x, dtype)


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, dtype: torch.dtype | None = None
) -> Tensor:
    """In fp32, rounded once."""
    wide = x.float()
    centered = wide - wide.mean(-1, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + epsilon) * weight.float()
    return (y if bias is None else y + bias.float()).to(x.dtype if dtype is None else dtype)


def _compiled(function: Callable[..., None]) -> Callable[..., Tensor]:
    def run(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, dtype: torch.dtype | None = None) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        y = torch.empty_like(x, dtype=dtype)
        columns = weight.shape[0]
        function(
            x.data_ptr(),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            x.numel() // columns,
            columns,
            epsilon,
            TYPES[x.dtype],
            TYPES[weight.dtype],
            TYPES[y.dtype],
            torch.get_num_threads(),
        )
        return y

    return run


table.register(
    table.Operation(
        "layer_norm",
        describe,
        (
            table.Kernel("layer-norm-avx512", "avx512", _compiled(_C.layer_norm_avx512), refuses),
            table.Kernel("layer-norm-avx2", "avx2", _compiled(_C.layer_norm_avx2), refuses),
            table.Kernel("layer-norm-generic", "generic", _compiled(_C.layer_norm_generic), refuses),
            table.Kernel("layer-norm-torch", table.TORCH, reference),
        ),
    )
)

LIBRARY.define("layer_norm(Tensor x, Tensor weight, Tensor? bias, float epsilon, ScalarType? dtype=None) -> Tensor")


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _needs_grad(x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> bool:
    return x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.epsilon = inputs[:4]
    ctx.given = len(inputs)
    ctx.save_for_backward(x, weight)


@once_differentiable
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needed = ctx.needs_input_grad[1:3]
    grad_x, *sums = norm_backward(grad, x, weight, ctx.epsilon, 0.0, True, any(needed))
    grad_weight, grad_bias = (each if wanted else None for each, wanted in zip(sums, needed, strict=True))
    return (grad_x, grad_weight, grad_bias, None, None)[: ctx.given]


_cpu = table.implement("layer_norm", check, _fake)
differentiate("layer_norm", _needs_grad, _setup, _backward)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    epsilon: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x [..., K] less each row's mean, over the row's standard deviation, times weight [K] plus bias [K] where there is
    one; computed in fp32 and rounded once.

    x is fp32, bf16 or fp16, weight and bias of x's dtype or fp32. y has x's dtype, or where x is fp32 the shorter
    `dtype`. Differentiable with respect to x, weight and bias. Raises ValueError or TypeError naming the argument.
    """
    if undispatched(x, weight, bias):
        return _cpu(x, weight, bias, epsilon, dtype)
    return torch.ops.parco.layer_norm.default(x, weight, bias, epsilon, dtype)
