"""rms_norm: y = x / sqrt(mean(x²) + epsilon) * (weight + offset) (Zhang and Sennrich, arXiv 1910.07467)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parco import _C, machine
from parco.kernels import table
from parco.kernels.library import LIBRARY, TYPES, check_float, differentiate, undispatched


class NormCall(NamedTuple):
    """One call of a norm on `rows` by `columns` numbers of `dtype`."""

    device: str
    isa: str
    dtype: torch.dtype
    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns} of {self.dtype}"


def describe(x: Tensor, weight: Tensor, *_: Any) -> NormCall:
    """The table's key of a call."""
    columns = weight.shape[0]
    return NormCall(x.device.type, machine.isa(), x.dtype, x.numel() // max(columns, 1), columns)


def check(x: Tensor, weight: Tensor, epsilon: float, offset: float, rounded: bool) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit together."""
    check_columns("rms_norm", x, weight=weight)


def check_columns(operation: str, x: Tensor, **tensors: Tensor | None) -> None:
    """Raise ValueError or TypeError, naming the argument, unless each of `tensors` that is there has x's dtype and one
    number per column of x.
    """
    check_float(operation, "x", x)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise TypeError(f"{operation}: {name} is {tensor.dtype}; {x.dtype}, which x is, is needed")
        if tensor.ndim != 1 or x.ndim == 0 or x.shape[-1] != tensor.shape[0]:
            raise ValueError(
                f"{operation}: {name} has the shape {tuple(tensor.shape)}; one number per column of x, which is "
                f"{tuple(x.shape)}, is needed"
            )


def _normalized(x: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)


def reference(x: Tensor, weight: Tensor, epsilon: float, offset: float, rounded: bool) -> Tensor:
    """In fp32; with `rounded` the quotient is first rounded to x's dtype."""
    quotient = _normalized(x, epsilon)
    if rounded:
        quotient = quotient.to(x.dtype).float()
    return (quotient * (weight.float() + offset)).to(x.dtype)


def _compiled(function: Callable[..., None]) -> Callable[..., Tensor]:
    def run(x: Tensor, weight: Tensor, epsilon: float, offset: float, rounded: bool) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y = torch.empty_like(x)
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
            torch.get_num_threads(),
        )
        return y

    return run


def refuses(call: NormCall) -> str | None:
    """Why compiled kernels do not run a call, or None."""
    return None if call.rows and call.columns else "one of the sizes is 0"


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

LIBRARY.define("rms_norm(Tensor x, Tensor weight, float epsilon, float offset, bool rounded) -> Tensor")


def fake(x: Tensor, *_: Any) -> Tensor:
    """As the result, without its numbers."""
    return x.new_empty(x.shape)


def _needs_grad(x: Tensor, weight: Tensor, *_: Any) -> bool:
    return x.requires_grad or weight.requires_grad


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.epsilon, ctx.offset, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """With n = x·r: grad_n = grad·(weight + offset), grad_x = r·(grad_n − n·mean(grad_n·n)), grad_weight = Σ grad·n."""
    x, weight = ctx.saved_tensors
    wide, normalized = grad.float(), _normalized(x, ctx.epsilon)
    inner = wide * (weight.float() + ctx.offset)
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + ctx.epsilon)
    grad_x = scale * (inner - normalized * (inner * normalized).mean(-1, keepdim=True))
    grad_weight = None
    if ctx.needs_input_grad[1]:
        grad_weight = (wide * normalized).reshape(-1, weight.shape[0]).sum(0).to(weight.dtype)
    return grad_x.to(x.dtype), grad_weight, None, None, None


_cpu = table.implement("rms_norm", check, fake)
differentiate("rms_norm", _needs_grad, _setup, _backward)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float = 1e-6, offset: float = 0.0, rounded: bool = False) -> Tensor:
    """x [..., K] over the root mean square of each row, times weight [K] + offset, in the dtype of both (fp32, bf16 or
    fp16); computed in fp32 and rounded once, or also before the multiplication where `rounded`, as Llama does.

    Differentiable with respect to x and weight. Raises ValueError or TypeError naming the argument.
    """
    if undispatched(x, weight):
        return _cpu(x, weight, epsilon, offset, rounded)
    return torch.ops.parco.rms_norm.default(x, weight, epsilon, offset, rounded)
