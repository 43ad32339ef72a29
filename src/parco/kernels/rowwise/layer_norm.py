"""layer_norm: y = (x − mean(x)) / sqrt(variance(x) + epsilon) * weight + bias (Ba et al., arXiv 1607.06450)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parco import _C
from parco.kernels import table
from parco.kernels.library import LIBRARY, TYPES, differentiate, undispatched
from parco.kernels.rowwise.norm import check_columns, describe, fake, refuses


def check(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit together."""
    check_columns("layer_norm", x, weight=weight, bias=bias)


def _normalized(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x less its mean over its deviation, and 1 / the deviation, both fp32."""
    wide = x.float()
    centered = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(centered.square().mean(-1, keepdim=True) + epsilon)
    return centered * scale, scale


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """In fp32, rounded once."""
    y = _normalized(x, epsilon)[0] * weight.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _compiled(function: Callable[..., None]) -> Callable[..., Tensor]:
    def run(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        y = torch.empty_like(x)
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

LIBRARY.define("layer_norm(Tensor x, Tensor weight, Tensor? bias, float epsilon) -> Tensor")


def _needs_grad(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> bool:
    return x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.epsilon = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """With n the normalized x and r its factor: grad_n = grad·weight, grad_x = r·(grad_n − mean(grad_n) −
    n·mean(grad_n·n)), grad_weight = Σ grad·n, grad_bias = Σ grad.
    """
    x, weight = ctx.saved_tensors
    wide, (normalized, scale) = grad.float(), _normalized(x, ctx.epsilon)
    inner = wide * weight.float()
    centered = inner - inner.mean(-1, keepdim=True)
    grad_x = scale * (centered - normalized * (inner * normalized).mean(-1, keepdim=True))
    columns = weight.shape[0]
    sums = [
        each.reshape(-1, columns).sum(0).to(weight.dtype) if needed else None
        for each, needed in zip((wide * normalized, wide), ctx.needs_input_grad[1:3], strict=True)
    ]
    return grad_x.to(x.dtype), *sums, None


_cpu = table.implement("layer_norm", check, fake)
differentiate("layer_norm", _needs_grad, _setup, _backward)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, epsilon: float = 1e-5) -> Tensor:
    """x [..., K] less each row's mean, over the row's standard deviation, times weight [K] plus bias [K] where there is
    one, in the dtype of all (fp32, bf16 or fp16); computed in fp32 and rounded once.

    Differentiable with respect to x, weight and bias. Raises ValueError or TypeError naming the argument.
    """
    if undispatched(x, weight, bias):
        return _cpu(x, weight, bias, epsilon)
    return torch.ops.parco.layer_norm.default(x, weight, bias, epsilon)
