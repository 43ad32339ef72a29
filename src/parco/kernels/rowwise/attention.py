"""attend: attention of one query for every head, which is what a decoding step asks for."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parco import _C, machine
from parco.kernels import table
from parco.kernels.library import LIBRARY, TYPES, check_float, differentiate, undispatched


class AttendCall(NamedTuple):
    """One call of attend: `queries` heads of `columns` numbers of `dtype`, against `tokens` keys."""

    device: str
    isa: str
    dtype: torch.dtype
    queries: int
    tokens: int
    columns: int

    def __str__(self) -> str:
        return f"{self.queries} queries of {self.columns} numbers of {self.dtype} against {self.tokens} keys"


def describe(q: Tensor, keys: Tensor, values: Tensor, *_: Any) -> AttendCall:
    """The table's key of a call."""
    queries = q.numel() // max(q.shape[-1], 1)
    return AttendCall(q.device.type, machine.isa(), q.dtype, queries, keys.shape[2], q.shape[-1])


def check(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float = 0.0, sinks: Tensor | None = None
) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit together."""
    check_float("attend", "q", q)
    if q.ndim != 3:
        raise ValueError(f"attend: q has the shape {tuple(q.shape)}; [batch, heads, columns] is needed")
    batch, heads, columns = q.shape
    if keys.ndim != 4 or keys.shape[0] != batch or keys.shape[3] != columns or keys.shape[2] == 0:
        raise ValueError(
            f"attend: keys has the shape {tuple(keys.shape)}; [{batch}, heads, at least 1, {columns}] is needed"
        )
    if keys.shape[1] == 0 or heads % keys.shape[1]:
        raise ValueError(f"attend: keys has {keys.shape[1]} heads; a divisor of {heads}, which q has, is needed")
    if values.shape != keys.shape:
        raise ValueError(f"attend: values has the shape {tuple(values.shape)}; {tuple(keys.shape)}, as keys, is needed")
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"attend: {name} is {tensor.dtype}; {q.dtype}, which q is, is needed")
    if not softcap >= 0:
        raise ValueError(f"attend: softcap={softcap}; a positive number, or 0 for none, is needed")
    if sinks is not None and sinks.dtype != q.dtype:
        raise TypeError(f"attend: sinks is {sinks.dtype}; {q.dtype}, which q is, is needed")
    if sinks is not None and tuple(sinks.shape) != (heads,):
        raise ValueError(f"attend: sinks has the shape {tuple(sinks.shape)}; one for each of {heads} heads is needed")


def _scores(q: Tensor, keys: Tensor, scale: float, softcap: float) -> Tensor:
    """[batch, key heads, queries of each, tokens], fp32."""
    batch, heads, columns = q.shape
    grouped = q.float().view(batch, keys.shape[1], heads // keys.shape[1], columns)
    scores = grouped @ keys.float().transpose(2, 3) * scale
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def _shares(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The softmaxes of scores [batch, key heads, queries of each, tokens], and what of them is the sinks'."""
    if sinks is None:
        return torch.softmax(scores, dim=-1), None
    more = sinks.float().view(1, *scores.shape[1:3], 1).expand(*scores.shape[:3], 1)
    shares = torch.softmax(torch.cat([scores, more], dim=-1), dim=-1)
    return shares[..., :-1], shares[..., -1]


def reference(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float = 0.0, sinks: Tensor | None = None
) -> Tensor:
    """In fp32, rounded once."""
    shares, _ = _shares(_scores(q, keys, scale, softcap), sinks)
    return (shares @ values.float()).reshape(q.shape).to(q.dtype)


def _compiled(function: Callable[..., None]) -> Callable[..., Tensor]:
    def run(
        q: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float = 0.0, sinks: Tensor | None = None
    ) -> Tensor:
        sinks = None if sinks is None else sinks.contiguous()
        q, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, keys, values))
        batch, heads, columns = q.shape
        y = torch.empty_like(q, memory_format=torch.contiguous_format)
        function(
            q.data_ptr(),
            (*q.stride(), 0),
            keys.data_ptr(),
            keys.stride(),
            values.data_ptr(),
            values.stride(),
            y.data_ptr(),
            batch,
            heads,
            keys.shape[1],
            keys.shape[2],
            columns,
            scale,
            softcap,
            TYPES[q.dtype],
            torch.get_num_threads(),
            0 if sinks is None else sinks.data_ptr(),
        )
        return y

    return run


def _refuses(call: AttendCall) -> str | None:
    return None if call.queries and call.columns else "there are no queries"


table.register(
    table.Operation(
        "attend",
        describe,
        (
            table.Kernel("attend-avx512", "avx512", _compiled(_C.attend_avx512), _refuses),
            table.Kernel("attend-avx2", "avx2", _compiled(_C.attend_avx2), _refuses),
            table.Kernel("attend-generic", "generic", _compiled(_C.attend_generic), _refuses),
            table.Kernel("attend-torch", table.TORCH, reference),
        ),
    )
)

LIBRARY.define("attend(Tensor q, Tensor keys, Tensor values, float scale, float softcap, Tensor? sinks=None) -> Tensor")


def _fake(q: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _needs_grad(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float = 0.0, sinks: Tensor | None = None
) -> bool:
    return any(each is not None and each.requires_grad for each in (q, keys, values, sinks))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, keys, values, ctx.scale, ctx.softcap, *sinks = inputs  # which the dispatcher leaves out where there are none
    ctx.given = len(inputs)
    ctx.save_for_backward(q, keys, values, *sinks)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """With p the probabilities: grad_values = pᵀ·grad, grad_scores = p·(grad_p − Σ p·grad_p), times 1 − tanh² of capped
    ones; a sink's grad_p is 0.
    """
    q, keys, values, *sinks = ctx.saved_tensors
    held: Tensor | None = sinks[0] if sinks else None
    scores = _scores(q, keys, ctx.scale, ctx.softcap)
    p, of_sinks = _shares(scores, held)
    grouped, queries = (x.float().view(*p.shape[:3], -1) for x in (grad.contiguous(), q.contiguous()))
    grad_p = grouped @ values.float().transpose(2, 3)
    mean = (p * grad_p).sum(-1, keepdim=True)
    grad_scores = p * (grad_p - mean) * ctx.scale
    if ctx.softcap:
        grad_scores *= 1 - (scores / ctx.softcap).square()
    grad_q = (grad_scores @ keys.float()).reshape(q.shape).to(q.dtype)
    grad_keys = (grad_scores.transpose(2, 3) @ queries).to(keys.dtype)
    grad_values = (p.transpose(2, 3) @ grouped).to(values.dtype)
    grad_sinks = None
    if held is not None and of_sinks is not None:
        grad_sinks = -(of_sinks * mean.squeeze(-1)).sum(0).reshape(held.shape).to(held.dtype)
    return (grad_q, grad_keys, grad_values, None, None, grad_sinks)[: ctx.given]


_cpu = table.implement("attend", check, _fake)
differentiate("attend", _needs_grad, _setup, _backward)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float = 0.0, sinks: Tensor | None = None
) -> Tensor:
    """softmax(scale · q·keysᵀ)·values of one query q [batch, heads, D] for every head, against T tokens' keys and
    values [batch, key heads, T, D]; heads / key heads of q in a row share a head of keys. All of one dtype (fp32, bf16
    or fp16); in fp32, rounded once. With `softcap` c, above 0, scores s are c·tanh(s / c), as in Gemma 2. With `sinks`
    [heads] each head's softmax has that score besides those of keys, of which no value comes, as in gpt-oss.

    Differentiable with respect to q, keys, values and sinks. Raises ValueError or TypeError naming the argument.
    """
    if undispatched(q, keys, values, sinks):
        return _cpu(q, keys, values, scale, softcap, sinks)
    return torch.ops.parco.attend.default(q, keys, values, scale, softcap, sinks)
