"""norm_backward: the gradients of rms_norm and of layer_norm, in one pass over x and the gradient of y."""

from collections.abc import Callable

import torch
from torch import Tensor

from parco import _C
from parco.kernels import table
from parco.kernels.library import LIBRARY, TYPES
from parco.kernels.rowwise.shapes import check_columns, check_result, describe, refuses


def check(grad: Tensor, x: Tensor, weight: Tensor, epsilon: float, offset: float, centered: bool, sums: bool) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit together."""
    check_columns("norm_backward", x, weight=weight)
    check_result("norm_backward", "grad", x, grad.dtype)
    if grad.shape != x.shape:
        raise ValueError(f"norm_backward: grad has the shape {tuple(grad.shape)}; {tuple(x.shape)}, as x, is needed")


def reference(
    grad: Tensor, x: Tensor, weight: Tensor, epsilon: float, offset: float, centered: bool, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """With n the normalized x, r its factor and i = grad·(weight + offset): grad_x = r·(i − n·mean(i·n)), and where
    `centered` r·mean(i) less; grad_weight = Σ grad·n, grad_bias = Σ grad. In fp32.
    """
    wide, grad = x.float(), grad.float()
    if centered:
        wide = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    normalized, inner = wide * scale, grad * (weight.float() + offset)
    along = normalized * (inner * normalized).mean(-1, keepdim=True)
    if centered:
        inner = inner - inner.mean(-1, keepdim=True)
    grad_x = (scale * (inner - along)).to(x.dtype)
    if not sums:
        return grad_x, x.new_empty(0), x.new_empty(0)
    grad_weight, grad_bias = (each.reshape(-1, len(weight)).sum(0) for each in (grad * normalized, grad))
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype) if centered else x.new_empty(0)


def _compiled(function: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def run(
        grad: Tensor, x: Tensor, weight: Tensor, epsilon: float, offset: float, centered: bool, sums: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
        grad_x, columns = torch.empty_like(x), len(weight)
        found = [torch.empty(columns if needed else 0) for needed in (sums, sums and centered)]
        function(
            grad.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            grad_x.data_ptr(),
            *(each.data_ptr() for each in found),
            x.numel() // columns,
            columns,
            epsilon,
            offset,
            centered,
            TYPES[x.dtype],
            TYPES[weight.dtype],
            TYPES[grad.dtype],
            torch.get_num_threads(),
        )
        kept = (each.to(weight.dtype if each.numel() else x.dtype) for each in found)
        return grad_x, *kept  # type: ignore[return-value]

    return run


table.register(
    table.Operation(
        "norm_backward",
        lambda grad, x, weight, *_: describe(x, weight),
        (
            table.Kernel("norm-backward-avx512", "avx512", _compiled(_C.norm_grad_avx512), refuses),
            table.Kernel("norm-backward-avx2", "avx2", _compiled(_C.norm_grad_avx2), refuses),
            table.Kernel("norm-backward-generic", "generic", _compiled(_C.norm_grad_generic), refuses),
            table.Kernel("norm-backward-torch", table.TORCH, reference),
        ),
    )
)

LIBRARY.define(
    "norm_backward(Tensor grad, Tensor x, Tensor weight, float epsilon, float offset, bool centered, bool sums) -> "
    "(Tensor, Tensor, Tensor)"
)


def _fake(
    grad: Tensor, x: Tensor, weight: Tensor, epsilon: float, offset: float, centered: bool, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight, grad_bias = (
        weight.new_empty(weight.shape) if needed else x.new_empty(0) for needed in (sums, sums and centered)
    )
    return x.new_empty(x.shape), grad_weight, grad_bias


table.implement("norm_backward", check, _fake)


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, epsilon: float, offset: float, centered: bool, sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and, where `sums` says so, of weight and (of a norm that is `centered`) bias, each in the
    dtype of what it belongs to, else empty. `grad` is that of y. The sums are taken of 64 rows at a time, and those one
    after the other, whatever the number of threads.
    """
    return torch.ops.parco.norm_backward.default(grad, x, weight, epsilon, offset, centered, sums)
