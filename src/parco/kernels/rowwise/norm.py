"""rms_norm: y = x / sqrt(mean(x²) + epsilon) * (weight + offset) (Zhang and Sennrich, arXiv 1910.07467)."""

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


def check(
    x: Tensor, weight: Tensor, epsilon: float, offset: float, rounded: bool, dtype: torch.dtype | None = None
) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit together."""
    check_columns("rms_norm", x, weight=weight)
    check_result("rms_norm", "dtype", x, dtype)


def reference(
    x: Tensor, weight: Tensor, epsilon: float, offset: float, rounded: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """In fp32; with `rounded` the quotient is first rounded to x's dtype."""
    wide = x.float()
    quotient = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    if rounded:
        quotient = quotient.to(x.dtype).float()
    return (quotient * (weight.float() + offset)).to(x.dtype if dtype is None else dtype)


def _compiled(function: Callable[..., None]) -> Callable[..., Tensor]:
    def run(
        x: Tensor, weight: Tensor, epsilon: float, offset: float, rounded: bool, dtype: torch.dtype | None = None
    ) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y = torch.empty_like(x, dtype=dtype)
        columns = weight.shape[0]
        function(
            x.data_ptr(),
            weight.data_ptr(),
            y.data_ptr(),
            x.numel() // columns,
            columns,
            epsilon,
            offset,
            rounded,
            TYPES[x.dtype],
            TYPES[weight.dtype],
            TYPES[y.dtype],
            torch.get_num_threads(),
        )
        return y

    return run


table.register(
    table.Operation(
        "rms_norm",
        describe,
        (
            table.Kernel("rms-norm-avx512", "avx512", _compiled(_C.rms_norm_avx512), refuses),
            table.Kernel("rms-norm-avx2", "avx2", _compiled(_C.rms_norm_avx2), refuses),
            table.Kernel("rms-norm-generic", "generic", _compiled(_C.rms_norm_generic), refuses),
            table.Kernel("rms-norm-torch", table.TORCH, reference),
        ),
    )
)

LIBRARY.define(
    "rms_norm(Tensor x, Tensor weight, float epsilon, float offset, bool rounded, ScalarType? dtype=None) -> Tensor"
)


def _fake(
    x: Tensor, weight: Tensor, epsilon: float, offset: float, rounded: bool, dtype: torch.dtype | None = None
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _needs_grad(x: Tensor, weight: Tensor, *_: Any) -> bool:
    return x.requires_grad or weight.requires_grad


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.epsilon, ctx.offset = inputs[:4]
    ctx.given = len(inputs)
    ctx.save_for_backward(x, weight)


@once_differentiable
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x, grad_weight, _ = norm_backward(grad, x, weight, ctx.epsilon, ctx.offset, False, ctx.needs_input_grad[1])
    return (grad_x, grad_weight if ctx.needs_input_grad[1] else None, None, None, None, None)[: ctx.given]


_cpu = table.implement("rms_norm", check, _fake)
differentiate("rms_norm", _needs_grad, _setup, _backward)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    epsilon: float = 1e-6,
    offset: float = 0.0,
    rounded: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x [..., K] over the root mean square of each row, times weight [K] + offset; computed in fp32 and rounded once,
    or also before the multiplication where `rounded`, as Llama does.

    x is fp32, bf16 or fp16, weight of x's dtype or fp32. y has x's dtype, or where x is fp32 the shorter `dtype`.
    Differentiable with respect to x and weight. Raises ValueError or TypeError naming the argument.
    """
    if undispatched(x, weight):
        return _cpu(x, weight, epsilon, offset, rounded, dtype)
    return torch.ops.parco.rms_norm.default(x, weight, epsilon, offset, rounded, dtype)
