"""attention: softmax(scale · q·keysᵀ)·values in tiles (FlashAttention-2, arXiv 2307.08691), and its derivative.

Forward also gives the logarithm of each softmax's denominator, by which backward finds the probabilities of a tile
without those of others.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parco import _C, machine
from parco.kernels import table
from parco.kernels.library import LIBRARY, TYPES, check_float, differentiate, undispatched


class AttentionCall(NamedTuple):
    """One call of attention: `heads` heads, of all sequences, of `queries` queries of `columns` numbers of `dtype`,
    against `tokens` keys.
    """

    device: str
    isa: str
    dtype: torch.dtype
    heads: int
    queries: int
    tokens: int
    columns: int

    def __str__(self) -> str:
        return (
            f"{self.heads} heads of {self.queries} queries of {self.columns} numbers of {self.dtype} against "
            f"{self.tokens} keys"
        )


def describe(q: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> AttentionCall:
    """The table's key of a call."""
    batch, heads, queries, columns = q.shape
    return AttentionCall(q.device.type, machine.isa(), q.dtype, batch * heads, queries, keys.shape[2], columns)


def check(q: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit together."""
    check_float("attention", "q", q)
    if q.ndim != 4:
        raise ValueError(f"attention: q has the shape {tuple(q.shape)}; [batch, heads, queries, columns] is needed")
    batch, heads, queries, columns = q.shape
    if columns == 0:
        raise ValueError(f"attention: q has the shape {tuple(q.shape)}; at least 1 column is needed")
    if keys.ndim != 4 or keys.shape[0] != batch or keys.shape[3] != columns or keys.shape[2] == 0:
        raise ValueError(
            f"attention: keys has the shape {tuple(keys.shape)}; [{batch}, heads, at least 1, {columns}] is needed"
        )
    if keys.shape[1] == 0 or heads % keys.shape[1]:
        raise ValueError(f"attention: keys has {keys.shape[1]} heads; a divisor of {heads}, which q has, is needed")
    if values.shape != keys.shape:
        raise ValueError(
            f"attention: values has the shape {tuple(values.shape)}; {tuple(keys.shape)}, as keys, is needed"
        )
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"attention: {name} is {tensor.dtype}; {q.dtype}, which q is, is needed")
    if causal and keys.shape[2] < queries:
        raise ValueError(
            f"attention: causal with {keys.shape[2]} keys for {queries} queries; at least as many keys are needed"
        )


def _scores(q: Tensor, keys: Tensor, scale: float, causal: bool) -> Tensor:
    """[batch, key heads, queries' heads of each, queries, keys], fp32; -inf where a query does not see a key."""
    scores = _grouped(q, keys) @ keys.float().unsqueeze(2).transpose(3, 4) * scale
    if causal:
        queries, tokens = scores.shape[3:]
        hidden = torch.ones(queries, tokens, dtype=torch.bool, device=q.device).triu(tokens - queries + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores


def _grouped(q: Tensor, keys: Tensor) -> Tensor:
    """q, or its like, in fp32, the heads that share one of keys beside each other."""
    return q.float().unflatten(1, (keys.shape[1], q.shape[1] // keys.shape[1]))


def _like(x: Tensor) -> Tensor:
    """Uninitialised, [B, H, T, D] that lies as [B, T, H, D], which is what the product that follows reads."""
    return x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2)


def reference(q: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """In fp32, rounded once; the logarithms of the softmaxes' denominators, fp32 [batch, heads, queries], with it."""
    scores = _scores(q, keys, scale, causal)
    y = torch.softmax(scores, dim=-1) @ values.float().unsqueeze(2)
    return _like(q).copy_(y.reshape(q.shape)), torch.logsumexp(scores, dim=-1).reshape(q.shape[:3])


def _by_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _places(*tensors: Tensor) -> tuple[Any, ...]:
    """Address and strides of each."""
    return tuple(each for x in tensors for each in (x.data_ptr(), x.stride()))


def _how(q: Tensor, keys: Tensor, scale: float, causal: bool) -> tuple[Any, ...]:
    """What C++ takes besides tensors."""
    sizes = (*q.shape[:2], keys.shape[1], q.shape[2], *keys.shape[2:])
    return sizes, scale, causal, TYPES[q.dtype], torch.get_num_threads()


def _compiled(function: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(q: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        q, keys, values = _by_rows(q, keys, values)
        y, logs = _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        function(*_places(q, keys, values), y.data_ptr(), logs.data_ptr(), *_how(q, keys, scale, causal))
        return y, logs

    return run


def _refuses(call: AttentionCall) -> str | None:
    return None if call.heads and call.queries else "there are no queries"


table.register(
    table.Operation(
        "attention",
        describe,
        (
            table.Kernel("attention-avx512", "avx512", _compiled(_C.attention_avx512), _refuses),
            table.Kernel("attention-avx2", "avx2", _compiled(_C.attention_avx2), _refuses),
            table.Kernel("attention-generic", "generic", _compiled(_C.attention_generic), _refuses),
            table.Kernel("attention-torch", table.TORCH, reference),
        ),
    )
)

LIBRARY.define("attention(Tensor q, Tensor keys, Tensor values, float scale, bool causal) -> (Tensor, Tensor)")


def _fake(q: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


Gradients = tuple[Tensor, Tensor, Tensor]


def _describe_backward(
    grad: Tensor, q: Tensor, keys: Tensor, values: Tensor, y: Tensor, logs: Tensor, scale: float, causal: bool
) -> AttentionCall:
    return describe(q, keys, values, scale, causal)


def _check_backward(
    grad: Tensor, q: Tensor, keys: Tensor, values: Tensor, y: Tensor, logs: Tensor, scale: float, causal: bool
) -> None:
    check(q, keys, values, scale, causal)
    for name, tensor in (("grad", grad), ("y", y)):
        if tensor.dtype != q.dtype or tensor.shape != q.shape:
            raise ValueError(
                f"attention_backward: {name} is {tuple(tensor.shape)} of {tensor.dtype}; {tuple(q.shape)} of "
                f"{q.dtype}, as q, is needed"
            )
    if logs.dtype != torch.float32 or logs.shape != q.shape[:3]:
        raise ValueError(
            f"attention_backward: logs is {tuple(logs.shape)} of {logs.dtype}; {tuple(q.shape[:3])} of torch.float32 "
            "is needed"
        )


def _backward_reference(
    grad: Tensor, q: Tensor, keys: Tensor, values: Tensor, y: Tensor, logs: Tensor, scale: float, causal: bool
) -> Gradients:
    """With p the probabilities: grad_values = pᵀ·grad, grad_scores = p·(grad·valuesᵀ − Σ grad·y); in fp32."""
    p = torch.exp(_scores(q, keys, scale, causal) - logs.unflatten(1, (keys.shape[1], -1)).unsqueeze(-1))
    of_y, queries = _grouped(grad, keys), _grouped(q, keys)
    same = (of_y * _grouped(y, keys)).sum(-1, keepdim=True)
    grad_scores = p * (of_y @ values.float().unsqueeze(2).transpose(3, 4) - same) * scale
    grad_q = (grad_scores @ keys.float().unsqueeze(2)).reshape(q.shape)
    grad_keys = (grad_scores.transpose(3, 4) @ queries).sum(2)
    grad_values = (p.transpose(3, 4) @ of_y).sum(2)
    return _like(q).copy_(grad_q), _like(keys).copy_(grad_keys), _like(values).copy_(grad_values)


def _compiled_backward(function: Callable[..., None]) -> Callable[..., Gradients]:
    def run(
        grad: Tensor, q: Tensor, keys: Tensor, values: Tensor, y: Tensor, logs: Tensor, scale: float, causal: bool
    ) -> Gradients:
        grad, q, keys, values = _by_rows(grad, q, keys, values)
        y, logs = y.transpose(1, 2).contiguous(), logs.contiguous()
        grads = _like(q), _like(keys), _like(values)
        addresses = (x.data_ptr() for x in (y, logs, *grads))
        function(*_places(grad, q, keys, values), *addresses, *_how(q, keys, scale, causal))
        return grads

    return run


table.register(
    table.Operation(
        "attention_backward",
        _describe_backward,
        (
            table.Kernel("attention-backward-avx512", "avx512", _compiled_backward(_C.attention_grad_avx512), _refuses),
            table.Kernel("attention-backward-avx2", "avx2", _compiled_backward(_C.attention_grad_avx2), _refuses),
            table.Kernel(
                "attention-backward-generic", "generic", _compiled_backward(_C.attention_grad_generic), _refuses
            ),
            table.Kernel("attention-backward-torch", table.TORCH, _backward_reference),
        ),
    )
)

LIBRARY.define(
    "attention_backward(Tensor grad, Tensor q, Tensor keys, Tensor values, Tensor y, Tensor logs, float scale, "
    "bool causal) -> (Tensor, Tensor, Tensor)"
)


def _fake_backward(
    grad: Tensor, q: Tensor, keys: Tensor, values: Tensor, y: Tensor, logs: Tensor, scale: float, causal: bool
) -> Gradients:
    return _like(q), _like(keys), _like(values)


def _needs_grad(q: Tensor, keys: Tensor, values: Tensor, *_: Any) -> bool:
    return q.requires_grad or keys.requires_grad or values.requires_grad


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.causal = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


@once_differentiable
def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.parco.attention_backward.default(grad, *ctx.saved_tensors, ctx.scale, ctx.causal)
    return *found, None, None


table.implement("attention_backward", _check_backward, _fake_backward)
_cpu = table.implement("attention", check, _fake)
differentiate("attention", _needs_grad, _setup, _backward)


def attention(q: Tensor, keys: Tensor, values: Tensor, scale: float | None = None, causal: bool = False) -> Tensor:
    """softmax(scale · q·keysᵀ)·values for queries q [B, heads, T, D], keys and values [B, key heads, S, D]: y
    [B, heads, T, D], which lies as [B, T, heads, D]. heads / key heads of q in a row share a head of keys and values.
    All of one dtype (fp32, bf16 or fp16); in fp32, rounded once. `scale` is 1/√D where it is None. `causal`, with
    T ≤ S: the last query sees all keys, and each one before it one key less.

    Memory beside the operands and gradients is some S·D numbers for each thread, and for the gradients 32 of them or
    32 MB more, whatever T·S. Differentiable once with respect to q, keys and values. Raises ValueError or TypeError
    naming the argument.
    """
    scale = max(1, q.shape[-1]) ** -0.5 if scale is None else scale
    if undispatched(q, keys, values):
        return _cpu(q, keys, values, scale, causal)[0]
    return torch.ops.parco.attention.default(q, keys, values, scale, causal)[0]
