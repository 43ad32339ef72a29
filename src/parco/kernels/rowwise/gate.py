"""gated: y = activation(gate) * up, the middle of a gated feed-forward block (Shazeer, arXiv 2002.05202)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parco import _C, machine
from parco.kernels import table
from parco.kernels.activations import ACTIVATIONS, NUMBERS, slope
from parco.kernels.library import LIBRARY, TYPES, check_float, differentiate, undispatched


class GateCall(NamedTuple):
    """One call of gated on `numbers` numbers of `dtype`."""

    device: str
    isa: str
    dtype: torch.dtype
    numbers: int
    activation: str

    def __str__(self) -> str:
        return f"{self.activation} of {self.numbers} numbers of {self.dtype}"


def describe(gate: Tensor, up: Tensor, activation: str) -> GateCall:
    """The table's key of a call."""
    return GateCall(gate.device.type, machine.isa(), gate.dtype, gate.numel(), activation)


def check(gate: Tensor, up: Tensor, activation: str) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit together."""
    check_float("gated", "gate", gate)
    if up.dtype != gate.dtype:
        raise TypeError(f"gated: up is {up.dtype}; {gate.dtype}, which gate is, is needed")
    if up.shape != gate.shape:
        raise ValueError(f"gated: up has the shape {tuple(up.shape)}; {tuple(gate.shape)}, as gate, is needed")
    if activation not in ACTIVATIONS:
        raise ValueError(f"gated: activation={activation!r}; one of {', '.join(ACTIVATIONS)} is needed")


def reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """In fp32, rounded once."""
    return (ACTIVATIONS[activation](gate.float()) * up.float()).to(gate.dtype)


def _are_halves(gate: Tensor, up: Tensor) -> bool:
    """Whether both are columns of rows that lie evenly in memory, as the halves of one product's result do."""
    if gate.ndim < 2 or gate.is_contiguous() or gate.stride() != up.stride() or gate.stride(-1) != 1:
        return False
    return all(gate.stride(i) == gate.stride(i + 1) * gate.shape[i + 1] for i in range(gate.ndim - 2))


def _compiled(function: Callable[..., None]) -> Callable[..., Tensor]:
    def run(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        rows, count, stride = 1, gate.numel(), gate.numel()
        if _are_halves(gate, up):
            count, stride = gate.shape[-1], gate.stride(-2)
            rows = gate.numel() // count
        else:
            gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate, memory_format=torch.contiguous_format)
        function(
            gate.data_ptr(),
            up.data_ptr(),
            y.data_ptr(),
            rows,
            count,
            stride,
            NUMBERS[activation],
            TYPES[gate.dtype],
            torch.get_num_threads(),
        )
        return y

    return run


table.register(
    table.Operation(
        "gated",
        describe,
        (
            table.Kernel("gated-avx512", "avx512", _compiled(_C.gated_avx512)),
            table.Kernel("gated-avx2", "avx2", _compiled(_C.gated_avx2)),
            table.Kernel("gated-generic", "generic", _compiled(_C.gated_generic)),
            table.Kernel("gated-torch", table.TORCH, reference),
        ),
    )
)

LIBRARY.define("gated(Tensor gate, Tensor up, str activation) -> Tensor")


def _fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _needs_grad(gate: Tensor, up: Tensor, activation: str) -> bool:
    return gate.requires_grad or up.requires_grad


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _check_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    check(gate, up, activation)
    if grad.dtype != gate.dtype or grad.shape != gate.shape:
        raise ValueError(
            f"gated_backward: grad is {tuple(grad.shape)} of {grad.dtype}; {tuple(gate.shape)} of {gate.dtype}, as "
            "gate, is needed"
        )


def _backward_reference(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """grad_gate = grad·up·activation′(gate), grad_up = grad·activation(gate); in fp32."""
    wide, held = grad.float(), gate.float()
    grad_gate = (wide * up.float() * slope(held, activation)).to(gate.dtype)
    return grad_gate, (wide * ACTIVATIONS[activation](held)).to(up.dtype)


def _compiled_backward(function: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
        grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        function(
            *(each.data_ptr() for each in (grad, gate, up, grad_gate, grad_up)),
            gate.numel(),
            NUMBERS[activation],
            TYPES[gate.dtype],
            torch.get_num_threads(),
        )
        return grad_gate, grad_up

    return run


table.register(
    table.Operation(
        "gated_backward",
        lambda grad, gate, up, activation: describe(gate, up, activation),
        (
            table.Kernel("gated-backward-avx512", "avx512", _compiled_backward(_C.gated_grad_avx512)),
            table.Kernel("gated-backward-avx2", "avx2", _compiled_backward(_C.gated_grad_avx2)),
            table.Kernel("gated-backward-generic", "generic", _compiled_backward(_C.gated_grad_generic)),
            table.Kernel("gated-backward-torch", table.TORCH, _backward_reference),
        ),
    )
)

LIBRARY.define("gated_backward(Tensor grad, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)")


def _fake_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


table.implement("gated_backward", _check_backward, _fake_backward)


@once_differentiable
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    return *torch.ops.parco.gated_backward.default(grad, gate, up, ctx.activation), None


_cpu = table.implement("gated", check, _fake)
differentiate("gated", _needs_grad, _setup, _backward)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up for tensors of one shape and dtype (fp32, bf16 or fp16), in fp32 and rounded once.

    `activation` is silu (SwiGLU), gelu or gelu_tanh (GeGLU), relu or relu_squared. Differentiable with respect to both.
    Raises ValueError or TypeError naming the argument.
    """
    if undispatched(gate, up):
        return _cpu(gate, up, activation)
    return torch.ops.parco.gated.default(gate, up, activation)
