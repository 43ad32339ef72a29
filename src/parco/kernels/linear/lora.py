"""linear_lora: y = x @ W.T + bias + scale·(x @ A.T) @ B.T in one call, W a sum of products of stored matrices as
`linear_chain` has it: a frozen matrix, dense or in few bits, with LoRA's factors beside it.

t = x @ A.T and t @ B.T are computed in fp32, some rows at a time, and handed to the product with W as its addend: the
sum is rounded once, and nothing of y's size stands beside it. Backwards g @ W and (scale·g @ B) @ A are added in fp32
and rounded once. Kept for it are x, which is the caller's own, and the parameters.

Dropout is on what A reads, and its mask is made again, some rows at a time, for the backward pass (`dropped`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parco import machine
from parco.kernels import table
from parco.kernels.library import LIBRARY, check_float, differentiate
from parco.kernels.linear import chain
from parco.kernels.linear.dropped import ROWS, dropped, factors_of

NAME = "linear_lora"
BACKWARD = "linear_lora_backward"


class LoraCall(NamedTuple):
    """One call of linear_lora, or of its derivative: `rows` of `dtype` against W of `plan` and factors of `rank`."""

    device: str
    isa: str
    dtype: torch.dtype
    rows: int
    plan: str
    rank: int

    def __str__(self) -> str:
        return f"{self.rows} rows of {self.dtype} x ({self.plan} + rank {self.rank})"


def describe(
    x: Tensor,
    tensors: Sequence[Tensor],
    bias: Tensor | None,
    plan: str,
    a: Tensor,
    b: Tensor,
    scale: float,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> LoraCall:
    """The table's key of a call."""
    return LoraCall(x.device.type, machine.isa(), x.dtype, x.numel() // max(1, x.shape[-1]), plan, a.shape[0])


def check(
    x: Tensor,
    tensors: Sequence[Tensor],
    bias: Tensor | None,
    plan: str,
    a: Tensor,
    b: Tensor,
    scale: float,
    seed: Tensor | None = None,
    p: float = 0.0,
    operation: str = NAME,
) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit together."""
    chain.check(x, tensors, bias, plan)
    terms = chain.parse(plan)
    outputs, columns = terms[0][0].outputs, terms[0][-1].columns
    rank = a.shape[0] if a.ndim == 2 else None
    for name, factor, shape in (("a", a, (rank, columns)), ("b", b, (outputs, rank))):
        check_float(operation, name, factor)
        if tuple(factor.shape) != shape:
            raise ValueError(
                f"{operation}: {name} has the shape {tuple(factor.shape)}; a [r, {columns}] and b [{outputs}, r] "
                "of one rank are needed"
            )
    if not 0 <= p < 1:
        raise ValueError(f"{operation}: p is {p:g}; it must be at least 0 and below 1")
    if p and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(f"{operation}: seed must be one int64 where p is not 0")


def _reference(
    x: Tensor,
    tensors: Sequence[Tensor],
    bias: Tensor | None,
    plan: str,
    a: Tensor,
    b: Tensor,
    scale: float,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """All of it in fp32, rounded once; [..., N]."""
    with torch.autocast(x.device.type, enabled=False):
        rows = x.reshape(-1, x.shape[-1])
        read = dropped(rows.float(), p, _number(seed)) if p else rows.float()
        y = chain.summed(rows, tensors, bias, plan) + scale * ((read @ a.float().t()) @ b.float().t())
        return y.to(x.dtype).reshape(*x.shape[:-1], b.shape[0])


def _blocked(
    x: Tensor,
    tensors: Sequence[Tensor],
    bias: Tensor | None,
    plan: str,
    a: Tensor,
    b: Tensor,
    scale: float,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """The product of the factors as the addend of the product with W; of one in fp32, where nothing is rounded between
    them, the other way round, in its memory.
    """
    with torch.autocast(x.device.type, enabled=False):
        rows = x.reshape(-1, x.shape[-1])
        right, left = a.float().t(), b.float().t() * scale
        whole = chain.apart(rows, tensors, bias, plan) if x.dtype == torch.float32 else None
        y = x.new_empty(rows.shape[0], b.shape[0]) if whole is None and rows.shape[0] > ROWS else whole
        for own, factors in factors_of(rows, p, _number(seed)):
            t = _read(rows[own], factors) @ right
            if whole is not None:
                whole[own].addmm_(t, left)
                continue
            part = chain.apart(rows[own], tensors, bias, plan, t @ left)
            y = part if y is None else y
            if y is not part:
                y[own] = part
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], b.shape[0]))  # pyright: ignore[reportPrivateUsage]


def _number(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed)


def _read(x: Tensor, factors: Tensor | None) -> Tensor:
    """What A reads of some rows, in fp32."""
    return x.float() if factors is None else x.float() * factors


def _refuses(call: LoraCall) -> str | None:
    return None if call.rows else "there are no rows"


def _register(name: str, describe: Callable[..., LoraCall], blocked: Any, reference: Any) -> None:
    prefix = name.replace("linear_lora", "lora-linear").replace("_", "-")
    table.register(
        table.Operation(
            name,
            describe,
            (
                table.Kernel(f"{prefix}-blocked", table.TORCH, blocked, _refuses),
                table.Kernel(f"{prefix}-torch", table.TORCH, reference),
            ),
        )
    )


def _describe_backward(
    grad: Tensor, x: Tensor | None, tensors: Sequence[Tensor], plan: str, a: Tensor, *_: Any
) -> LoraCall:
    rows = grad.numel() // max(1, grad.shape[-1])
    return LoraCall(grad.device.type, machine.isa(), grad.dtype, rows, plan, a.shape[0])


def _check_backward(
    grad: Tensor,
    x: Tensor | None,
    tensors: Sequence[Tensor],
    plan: str,
    a: Tensor,
    b: Tensor,
    scale: float,
    seed: Tensor | None,
    p: float,
    needs: Sequence[bool],
) -> None:
    terms = chain.parse(plan)
    like = grad.new_empty((*grad.shape[:-1], terms[0][-1].columns)) if x is None else x
    check(like, tensors, None, plan, a, b, scale, seed, p, BACKWARD)
    if tuple(grad.shape) != (*like.shape[:-1], terms[0][0].outputs):
        raise ValueError(f"{BACKWARD}: grad has the shape {tuple(grad.shape)}; that of y is needed")
    if x is None and any(needs[1:3]):
        raise ValueError(f"{BACKWARD}: x is None; the gradients of a and b need it")


def _reference_backward(
    grad: Tensor,
    x: Tensor | None,
    tensors: Sequence[Tensor],
    plan: str,
    a: Tensor,
    b: Tensor,
    scale: float,
    seed: Tensor | None,
    p: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Those of grad_x, grad_a and grad_b that `needs` asks for, in fp32 arithmetic, each rounded once."""
    with torch.autocast(grad.device.type, enabled=False):
        columns = a.shape[1]
        wide = grad.reshape(-1, grad.shape[-1]).float()
        factors = dropped(wide.new_ones(wide.shape[0], columns), p, _number(seed)) if p else wide.new_ones(())
        back = scale * wide @ b.float()
        found: list[Tensor] = []
        if needs[0]:
            grad_x = chain.times(wide, tensors, plan) + (back @ a.float()) * factors
            found.append(grad_x.to(grad.dtype).reshape(*grad.shape[:-1], columns))
        if x is not None:
            read = x.reshape(-1, columns).float() * factors
            if needs[1]:
                found.append((back.t() @ read).to(a.dtype))
            if needs[2]:
                found.append((scale * wide.t() @ (read @ a.float().t())).to(b.dtype))
        return found


def _blocked_backward(
    grad: Tensor,
    x: Tensor | None,
    tensors: Sequence[Tensor],
    plan: str,
    a: Tensor,
    b: Tensor,
    scale: float,
    seed: Tensor | None,
    p: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The same with x in fp32, and what is dropped of it, some rows at a time."""
    with torch.autocast(grad.device.type, enabled=False):
        columns = a.shape[1]
        wide = grad.reshape(-1, grad.shape[-1]).float()
        narrow, right = a.float(), a.float().t()
        back = (wide @ b.float()).mul_(scale)
        grad_x = chain.times(wide, tensors, plan) if needs[0] else None
        grad_a, grad_b = torch.zeros_like(narrow), torch.zeros_like(b, dtype=torch.float32)
        rows = None if x is None else x.reshape(-1, columns)
        like = wide.new_empty(()).expand(wide.shape[0], columns)
        for own, factors in factors_of(like, p, _number(seed)):
            if rows is not None:
                read = _read(rows[own], factors)
                grad_a.addmm_(back[own].t(), read)
                grad_b.addmm_(wide[own].t(), read @ right, alpha=scale)
            if grad_x is None:
                continue
            if factors is None:
                grad_x[own].addmm_(back[own], narrow)
            else:
                grad_x[own].addcmul_(back[own] @ narrow, factors)
        found = [grad_x.to(grad.dtype).reshape(*grad.shape[:-1], columns)] if grad_x is not None else []
        made = zip((grad_a, grad_b), (a, b), needs[1:], strict=True)
        return found + [each.to(factor.dtype) for each, factor, need in made if need]


_register(NAME, describe, _blocked, _reference)
_register(BACKWARD, _describe_backward, _blocked_backward, _reference_backward)

LIBRARY.define(
    f"{NAME}(Tensor x, Tensor[] tensors, Tensor? bias, str plan, Tensor a, Tensor b, float scale, Tensor? seed=None,"
    " float p=0.0) -> Tensor"
)
LIBRARY.define(
    f"{BACKWARD}(Tensor grad, Tensor? x, Tensor[] tensors, str plan, Tensor a, Tensor b, float scale, Tensor? seed,"
    " float p, bool[] needs) -> Tensor[]"
)


def _fake(x: Tensor, tensors: object, bias: object, plan: str, a: Tensor, b: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], b.shape[0]))


def _fake_backward(grad: Tensor, x: object, tensors: object, plan: str, a: Tensor, b: Tensor, *rest: Any) -> Any:
    made = (grad.new_empty((*grad.shape[:-1], a.shape[1])), torch.empty_like(a), torch.empty_like(b))
    return [each for each, need in zip(made, rest[-1], strict=True) if need]


def _needs_grad(x: Tensor, tensors: object, bias: Tensor | None, plan: str, a: Tensor, b: Tensor, *_: Any) -> bool:
    return any(each is not None and each.requires_grad for each in (x, bias, a, b))


def _composed(
    x: Tensor,
    tensors: Sequence[Tensor],
    bias: Tensor | None,
    plan: str,
    a: Tensor,
    b: Tensor,
    scale: float,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> Tensor | None:
    """By operations apart where matrices of W train."""
    if not any(tensor.requires_grad for tensor in tensors):
        return None
    rows = x.reshape(-1, x.shape[-1])
    read = _read(rows, dropped(torch.ones_like(rows, dtype=torch.float32), p, _number(seed)) if p else None)
    added = (read @ a.float().t()) @ b.float().t() * scale
    return chain.apart(rows, tensors, bias, plan, added).reshape(*x.shape[:-1], b.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, tensors, bias, ctx.plan, a, b, ctx.scale, *dropout = inputs
    ctx.given, ctx.count = len(inputs), len(tensors)
    seed, ctx.p = (*dropout, None, 0.0)[:2] if len(dropout) != 1 else (dropout[0], 0.0)
    trains = a.requires_grad or b.requires_grad
    ctx.save_for_backward(x if trains else None, a, b, seed, *tensors)
    ctx.bias_dtype = None if bias is None else bias.dtype


@once_differentiable
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, a, b, seed, *tensors = ctx.saved_tensors
    needs_x, _, needs_bias, _, needs_a, needs_b, *_ = ctx.needs_input_grad
    needs = [needs_x, needs_a, needs_b]
    operation = torch.ops.parco.linear_lora_backward.default
    found = iter(operation(grad, x, tensors, ctx.plan, a, b, ctx.scale, seed, ctx.p, needs) if any(needs) else ())
    grad_x, grad_a, grad_b = (next(found) if need else None for need in needs)
    grad_bias = None
    if needs_bias:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return (grad_x, None, grad_bias, None, grad_a, grad_b, None, None, None)[: ctx.given]


table.implement(NAME, check, _fake)
table.implement(BACKWARD, _check_backward, _fake_backward)
differentiate(NAME, _needs_grad, _setup, _backward, _composed)


def linear_lora(
    x: Tensor,
    tensors: Sequence[Tensor],
    bias: Tensor | None,
    plan: str,
    a: Tensor,
    b: Tensor,
    scale: float,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """y [..., N] = x [..., K] @ W.T + bias + scale·(dropout(x) @ a.T) @ b.T in x's dtype (fp32, bf16 or fp16), W made
    of `tensors` as `plan` says ("bf16 96x64", see `linear_chain`), a [r, K] and b [N, r] fp32, bf16 or fp16.

    Summed in fp32 and rounded once, but where W has several terms, whose sums are rounded too. Each number that a reads
    is dropped with probability `p`, by `seed`, one int64. Differentiable with respect to x, bias, a and b, and to dense
    matrices of W. Raises ValueError or TypeError naming the argument.
    """
    return torch.ops.parco.linear_lora.default(x, list(tensors), bias, plan, a, b, scale, seed, p)
