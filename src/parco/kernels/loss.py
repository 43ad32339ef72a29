"""linear_cross_entropy: the cross entropy of x @ weight.T + bias with labels, without the logits ever being whole.

Logits are made some rows at a time, turned into the gradient of the loss in place, and multiplied at once by what gives
the gradients of x and of the weight: so they are computed once, and what backward does is to hand these over. Only
where every row has a loss of its own are they computed again in backward, which then knows the factor of each. As in
Liger (arXiv 2410.10989); rows whose label is ignored take no part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parco import machine
from parco.kernels.library import check_float, graph_break
from parco.kernels.rowwise.cross_entropy import cross_entropy_

Reduction = Literal["mean", "sum", "none"]

NUMBERS_AT_ONCE = 1 << 23
"""Logits that are held at a time, 32 MB of fp32."""

LEAST_ROWS, MOST_ROWS = 64, 512
"""Rows at a time: fewer make slow products, and each time the gradient of the weight is read and written."""

MOST_COUNTED = 0.9
"""The share of rows that count above which all are computed: to pick some out would cost more than it saves."""


@dataclass(frozen=True)
class _Terms:
    """What the loss is, but for its tensors; `dtype` is that of the products' operands, `trains` asks for gradients."""

    softcap: float
    smoothing: float
    reduction: Reduction
    dtype: torch.dtype
    trains: bool


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    divisor: Tensor | float | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Cross entropy of the logits x [..., K] · weight [V, K]ᵀ + bias [V] with labels [...], int64: fp32, a scalar, or
    [...] where `reduction` is "none".

    Labels are columns, or `ignore_index`: such a row counts nowhere, and the mean of none is NaN, as PyTorch's. A
    `divisor` takes the place of their number in the mean (Trainer's `num_items_in_batch`). The operands of the three
    products are rounded to `dtype` (fp32, bf16 or fp16; by default autocast's, else that of x and weight) and summed in
    fp32; logits are fp32, or of `dtype` on a GPU and where the processor multiplies bf16 in tiles. `softcap` and
    `label_smoothing` as in `cross_entropy_`. Gradients of x, weight and bias have their dtypes; the weight's is summed
    in fp32 over the pieces, whose products have the logits' dtype. torch.compile does not trace it: a graph breaks
    here. Raises ValueError or TypeError naming the argument.
    """
    _check(x, weight, labels, bias)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"linear_cross_entropy: softcap={softcap}; a positive number, or None, is needed")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"linear_cross_entropy: label_smoothing={label_smoothing}; a share, 0 to 1, is needed")
    if reduction not in get_args(Reduction):
        raise ValueError(f"linear_cross_entropy: reduction={reduction!r}; one of mean, sum, none is needed")
    if divisor is not None and reduction != "mean":
        raise ValueError(f"linear_cross_entropy: divisor={divisor} is that of a mean; reduction is {reduction!r}")
    kind = x.device.type
    if dtype is None:
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else torch.promote_types(x.dtype, weight.dtype)
    check_float("linear_cross_entropy", "dtype", torch.empty(0, dtype=dtype, device="meta"))
    terms = _Terms(softcap or 0.0, label_smoothing, reduction, dtype, torch.is_grad_enabled())
    return _run(x, weight, labels, bias, ignore_index, divisor, terms)


def _check(x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_float("linear_cross_entropy", name, tensor)
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"linear_cross_entropy: weight has the shape {tuple(weight.shape)}; [V, K], V > 0, is needed")
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: x has the shape {tuple(x.shape)}; its last dimension must be {weight.shape[1]}, "
            "as the weight's"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"linear_cross_entropy: labels are {labels.dtype}; torch.int64 is needed")
    if labels.shape != x.shape[:-1]:
        raise ValueError(
            f"linear_cross_entropy: labels have the shape {tuple(labels.shape)}; {tuple(x.shape[:-1])}, one per row of "
            "x, is needed"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: bias has the shape {tuple(bias.shape)}; ({weight.shape[0]},), as the weight has "
            "rows, is needed"
        )


@graph_break
def _run(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    divisor: Tensor | float | None,
    terms: _Terms,
) -> Tensor:
    flat = labels.reshape(-1)
    valid = flat != ignore_index
    outside = valid & ((flat < 0) | (flat >= weight.shape[0]))
    if outside.any():
        raise ValueError(
            f"linear_cross_entropy: labels contain {int(flat[outside][0])}; columns are 0 to {weight.shape[0] - 1}, "
            f"and {ignore_index} is ignored"
        )
    chosen = valid.nonzero().squeeze(1)
    share = 1.0
    if terms.reduction == "mean":
        count = float(len(chosen) if divisor is None else divisor)
        share = 1 / count if count else float("nan")
    if len(chosen) > MOST_COUNTED * len(flat):
        chosen, flat = None, torch.where(valid, flat, -1)
    with torch.autocast(x.device.type, enabled=False):
        found: Tensor = _LinearCrossEntropy.apply(x, weight, bias, flat, chosen, share, terms)  # type: ignore[assignment]
    return found.reshape(labels.shape) if terms.reduction == "none" else found


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chosen: Tensor | None,
        share: float,
        terms: _Terms,
    ) -> Tensor:
        needed = tuple(ctx.needs_input_grad[:3])
        ctx.terms, ctx.share, ctx.made = terms, share, None
        ctx.save_for_backward(x, weight, bias, labels, chosen)
        at_once = terms.trains and any(needed) and terms.reduction != "none"
        wanted = needed if at_once else (False, False, False)
        losses, made = _sweep(x, weight, bias, labels, chosen, None, share, wanted, terms)
        if at_once:
            ctx.made = made
        return losses if terms.reduction == "none" else losses.sum(dtype=torch.float64).mul(share).to(torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        (grad,) = grad_outputs
        made: tuple[Tensor | None, ...] | None = ctx.made
        ctx.made = None  # whoever gets them may write into them; a second backward makes them anew
        terms: _Terms = ctx.terms
        x, weight, bias, labels, chosen = ctx.saved_tensors
        if made is None:
            factors = grad.to(torch.float32).contiguous() if terms.reduction == "none" else None
            with torch.autocast(grad.device.type, enabled=False):
                needed = tuple(ctx.needs_input_grad[:3])
                made = _sweep(x, weight, bias, labels, chosen, factors, ctx.share, needed, terms)[1]
        if terms.reduction != "none" and (grad.is_cuda or float(grad) != 1.0):
            for each in made:
                if each is not None:
                    each.mul_(grad)
        owners: tuple[Tensor | None, ...] = (x, weight, bias)
        grads = (None if m is None or o is None else m.to(o.dtype) for m, o in zip(made, owners, strict=True))
        return *grads, None, None, None, None


def _sweep(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    chosen: Tensor | None,
    factors: Tensor | None,
    share: float,
    wanted: tuple[bool, ...],
    terms: _Terms,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The losses of all rows, fp32, and the gradients, as `wanted`, of `share` times their sum, or that of the losses
    times `factors`: in the dtypes of their owners, or in fp32. Only the rows `chosen` are computed.
    """
    rows, columns = x.detach().reshape(-1, x.shape[-1]), weight.shape[0]
    held = _operand(weight.detach(), terms.dtype)
    wants_x, wants_weight, wants_bias = wanted
    # A factor that is yet to come, a loss scale, may be what keeps the gradient within fp16.
    kept = torch.float32 if x.dtype == torch.float16 else x.dtype
    grad_x = torch.zeros_like(rows, dtype=kept) if wants_x else None
    count = len(rows) if chosen is None else len(chosen)
    grad_weight = torch.empty(weight.shape, dtype=torch.float32, device=x.device) if wants_weight else None
    if grad_weight is not None and count == 0:
        grad_weight.zero_()
    grad_bias = torch.zeros(columns, dtype=torch.float32, device=x.device) if wants_bias else None
    losses = torch.zeros(len(rows), dtype=torch.float32, device=x.device)
    together = min(max(NUMBERS_AT_ONCE // columns // LEAST_ROWS * LEAST_ROWS, LEAST_ROWS), MOST_ROWS, max(count, 1))
    room = held.new_empty(together, columns)
    for begin in range(0, count, together):
        end = min(begin + together, count)
        part: Any = slice(begin, end) if chosen is None else chosen[begin:end]
        a = _operand(rows[part], terms.dtype)
        logits = room[: end - begin]
        torch.mm(a, held.T, out=logits)
        if bias is not None:
            logits += bias.detach()
        own = None if factors is None else factors[part]
        losses[part] = cross_entropy_(
            logits, labels[part], own, terms.softcap, terms.smoothing, any(wanted), terms.dtype
        )
        if grad_x is not None:
            grad_x[part] = torch.mm(logits, held).mul_(share).to(kept)
        if grad_weight is not None:
            _add_product(grad_weight, logits, a, share, anew=begin == 0)
        if grad_bias is not None:
            grad_bias.add_(logits.sum(0, dtype=torch.float32), alpha=share)
    return losses, (
        None if grad_x is None else grad_x.reshape(x.shape),
        grad_weight if grad_weight is None or weight.dtype == torch.float16 else grad_weight.to(weight.dtype),
        grad_bias,
    )


def _add_product(total: Tensor, left: Tensor, right: Tensor, share: float, anew: bool) -> None:
    """total += share · leftᵀ · right, in fp32; total = where it begins `anew`."""
    if left.dtype == torch.float32:
        total.addmm_(left.T, right, beta=0 if anew else 1, alpha=share)
    elif anew:
        torch.mul(torch.mm(left.T, right), share, out=total)
    else:
        total.add_(torch.mm(left.T, right), alpha=share)


def _operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of `dtype` nearest to x, held as they are multiplied: in fp32 where there are no units for others."""
    x = x.to(dtype)
    return x if x.is_cuda or (dtype == torch.bfloat16 and machine.has("amx")) else x.to(torch.float32)
