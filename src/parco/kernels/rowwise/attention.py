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


def describe(q: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float = 0.0) -> AttendCall:
    """The table's key of a call."""
    queries = q.numel() // max(q.shape[-1], 1)
    return AttendCall(q.device.type, machine.isa(), q.dtype, queries, keys.shape[2], q.shape[-1])


def check(q: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float = 0.0) -> None:
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


def _scores(q: Tensor, keys: Tensor, scale: float, softcap: float) -> Tensor:
    """[batch, key heads, queries of each, tokens], fp32."""
    batch, heads, columns = q.shape
    grouped = q.float().view(batch, keys.shape[1], heads // keys.shape[1], columns)
    scores = grouped @ keys.float().transpose(2, 3) * scale
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def reference(q: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float = 0.0) -> Tensor:
    """In fp32, rounded once."""
    return (torch.softmax(_scores(q, keys, scale, softcap), dim=-1) @ values.float()).reshape(q.shape).to(q.dtype)


def _compiled(function: Callable[..., None]) -> Callable[..., Tensor]:
    def run(q: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float = 0.0) -> Tensor:
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

LIBRARY.define("attend(Tensor q, Tensor keys, Tensor values, float scale, float softcap) -> Tensor")


def _fake(q: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float = 0.0) -> Tensor:
    return q.new_empty(q.shape)


def _needs_grad(q: Tensor, keys: Tensor, values: Tensor, *_: Any) -> bool:
    return q.requires_grad or keys.requires_grad or values.requires_grad


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """With p the probabilities: grad_values = pᵀ·grad, grad_scores = p·(grad_p − Σ p·grad_p), times 1 − tanh² of capped
    ones.
    """
    q, keys, values = ctx.saved_tensors
    scores = _scores(q, keys, ctx.scale, ctx.softcap)
    p = torch.softmax(scores, dim=-1)
    grouped, queries = (x.float().view(*p.shape[:3], -1) for x in (grad.contiguous(), q.contiguous()))
    grad_p = grouped @ values.float().transpose(2, 3)
    grad_scores = p * (grad_p - (p * grad_p).sum(-1, keepdim=True)) * ctx.scale
    if ctx.softcap:
        grad_scores *= 1 - (scores / ctx.softcap).square()
    grad_q = (grad_scores @ keys.float()).reshape(q.shape).to(q.dtype)
    grad_keys = (grad_scores.transpose(2, 3) @ queries).to(keys.dtype)
    grad_values = (p.transpose(2, 3) @ grouped).to(values.dtype)
    return grad_q, grad_keys, grad_values, None, None


_cpu = table.implement("attend", check, _fake)
differentiate("attend", _needs_grad, _setup, _backward)


def attend(q: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float = 0.0) -> Tensor:
    """softmax(scale · q·keysᵀ)·values of one query q [batch, heads, D] for every head, against T tokens' keys and
    values [batch, key heads, T, D]; heads / key heads of q in a row share a head of keys. All of one dtype (fp32, bf16
    or fp16); in fp32, rounded once. With `softcap` c, above 0, scores s are c·tanh(s / c), as in Gemma 2.

    Differentiable with respect to q, keys and values. Raises ValueError or TypeError naming the argument.
    """
    if undispatched(q, keys, values):
        return _cpu(q, keys, values, scale, softcap)
    return torch.ops.parco.attend.default(q, keys, values, scale, softcap)
