"""y = x·Wᵀ + bias + s·(x·Aᵀ)·Bᵀ, whatever the product with W is.

Beside a frozen matrix whose product `linear_chain` knows, dense or in few bits, that is one operation, `linear_lora`.

Beside any other (a recipe's, sparse ones, another adapter's) it comes in two halves, around the product with W: `enter`
hands x on and computes t = x·Aᵀ; `leave` adds s·t·Bᵀ to the product's own result, in its memory. Backwards they change
places: (s·g·B)·A is added to the product's gradient of x, again in its memory. So there too x·Wᵀ and g·W are each
written once, though in 16 bits rounded twice. Kept for the backward pass are x, which is the caller's own, and t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from parco.kernels.library import TYPES, transformed
from parco.kernels.linear import linear_lora
from parco.kernels.linear.dropped import dropped, factors_of


class Frozen(NamedTuple):
    """A layer's own matrix as `linear_lora` takes it."""

    tensors: Sequence[Tensor]
    bias: Tensor | None
    plan: str


@dataclass(frozen=True)
class Own:
    """The layer's own product, without adapters: x [M, K] -> [M, N] in memory of its own. `frozen` where its matrix is
    known and does not train.
    """

    multiply: Callable[[Tensor], Tensor]
    frozen: Frozen | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.multiply(x)


def with_factors(
    product: Callable[[Tensor], Tensor], x: Tensor, a: Tensor, b: Tensor, scale: float, p: float = 0.0
) -> Tensor:
    """product(x) + scale·(dropout(x)·Aᵀ)·Bᵀ [M, N] for x [M, K], A [r, K] and B [N, r], which may have other float
    dtypes. With `p` a seed is drawn from PyTorch's own generator of the CPU.
    """
    frozen = product.frozen if isinstance(product, Own) else None
    if frozen is not None and x.is_cpu and x.dtype in TYPES and a.dtype in TYPES and not transformed():
        seed = torch.randint(1 << 62, (1,), device="cpu") if p else None
        return linear_lora(x, frozen.tensors, frozen.bias, frozen.plan, a, b, scale, seed, p)
    x, t = enter(x, a, p)
    return leave(product(x), t, b, scale)


def enter(x: Tensor, a: Tensor, p: float = 0.0) -> tuple[Tensor, Tensor]:
    """(x, t): x [M, K] for the product with W, and t [M, r] = dropout(x)·Aᵀ in x's dtype with A [r, K] of any float
    dtype, rounded to it. x is to be used in one product only, whose gradient of x this operation then owns. With `p` a
    seed is drawn from PyTorch's own generator of the CPU.
    """
    if _plainly():
        return x, functional.linear(functional.dropout(x, p), a.to(x.dtype))
    seed = int(torch.randint(1 << 62, (), device="cpu")) if p else 0
    if not torch.is_grad_enabled():
        return x, functional.linear(dropped(x, p, seed) if p else x, a.to(x.dtype))
    return _Enter.apply(x, a, p, seed)  # type: ignore[no-any-return]


def leave(y: Tensor, t: Tensor, b: Tensor, scale: float) -> Tensor:
    """y [M, N] + scale·t·Bᵀ with t [M, r] of y's dtype and B [N, r] of any float dtype, rounded to it. In y's own
    memory: y is to be a product's result that nobody else reads.
    """
    if _plainly():
        return y + functional.linear(t, b.to(y.dtype)) * scale
    if not torch.is_grad_enabled():
        return y.addmm_(t, b.to(y.dtype).t(), alpha=scale)
    return _Leave.apply(y, t, b, scale)  # type: ignore[no-any-return]


def _plainly() -> bool:
    """Whether a compiler or a transform is at work, for which the same is written in operations that it knows."""
    return torch.compiler.is_compiling() or transformed()


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, p: float, seed: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        narrow = a.to(x.dtype)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, narrow)
        ctx.p, ctx.seed, ctx.dtype = p, seed, a.dtype
        handed = x.view_as(x)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(handed)
        return handed, torch.mm(dropped(x, p, seed) if p else x, narrow.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        grad, grad_t = grad_outputs
        x, a = ctx.saved_tensors
        if grad_t is None:
            return grad, None, None, None
        grad_a = None
        if ctx.needs_input_grad[1]:
            grad_a = torch.mm(grad_t.t(), dropped(x, ctx.p, ctx.seed) if ctx.p else x).to(ctx.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_a, None, None
        if grad is None:
            grad = grad_t.new_zeros(grad_t.shape[0], a.shape[1])
        if ctx.p:
            for rows, factors in factors_of(grad, ctx.p, ctx.seed):
                assert factors is not None
                grad[rows].addcmul_(torch.mm(grad_t[rows], a), factors)
        else:
            grad.addmm_(grad_t, a)
        return grad, grad_a, None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, t: Tensor, b: Tensor, scale: float) -> Tensor:
        narrow = b.to(y.dtype)
        ctx.save_for_backward(t if ctx.needs_input_grad[2] else None, narrow)
        ctx.scale, ctx.dtype = scale, b.dtype
        y.addmm_(t, narrow.t(), alpha=scale)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        (grad,) = grad_outputs
        t, b = ctx.saved_tensors
        grad_t = torch.mm(grad, b).mul_(ctx.scale) if ctx.needs_input_grad[1] else None
        grad_b = torch.mm(grad.t(), t).mul_(ctx.scale).to(ctx.dtype) if ctx.needs_input_grad[2] else None
        return grad if ctx.needs_input_grad[0] else None, grad_t, grad_b, None
