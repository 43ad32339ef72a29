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
from parco.kernels.cast.philox import dropout_factors
from parco.kernels.library import LIBRARY, TYPES, check_float, differentiate, undispatched

HOW = "float scale, bool causal, Tensor? mask=None, Tensor? seed=None, float p=0.0"
"""How in the schemas."""


class How(NamedTuple):
    """What a call has besides its operands, in the operation's order."""

    scale: float
    causal: bool
    mask: Tensor | None = None
    seed: Tensor | None = None
    p: float = 0.0


class AttentionCall(NamedTuple):
    """One call of attention: `heads` heads, of all sequences, of `queries` queries of `columns` numbers of `dtype`,
    against `tokens` keys; whether it is causal, has a mask and drops.
    """

    device: str
    isa: str
    dtype: torch.dtype
    heads: int
    queries: int
    tokens: int
    columns: int
    causal: bool
    masked: bool
    drops: bool

    def __str__(self) -> str:
        return (
            f"{self.heads} heads of {self.queries} queries of {self.columns} numbers of {self.dtype} against "
            f"{self.tokens} keys{', causal' * self.causal}{', masked' * self.masked}{', with dropout' * self.drops}"
        )


def describe(q: Tensor, keys: Tensor, values: Tensor, *given: Any) -> AttentionCall:
    """The table's key of a call."""
    (batch, heads, queries, columns), how = q.shape, How(*given)
    sizes = (batch * heads, queries, keys.shape[2], columns)
    kind = (how.causal, how.mask is not None, how.p > 0)
    return AttentionCall(q.device.type, machine.isa(), q.dtype, *sizes, *kind)


def check(q: Tensor, keys: Tensor, values: Tensor, *how: Any) -> None:
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
    _check_how(How(*how), (batch, heads, queries, keys.shape[2]))


def _check_how(how: How, scores: tuple[int, int, int, int]) -> None:
    queries, tokens = scores[2:]
    if how.causal and tokens < queries:
        raise ValueError(
            f"attention: causal with {tokens} keys for {queries} queries; at least as many keys are needed"
        )
    if not 0 <= how.p < 1:
        raise ValueError(f"attention: p is {how.p:g}; it must be at least 0 and below 1")
    if how.p and (how.seed is None or how.seed.dtype != torch.int64 or how.seed.numel() != 1):
        raise ValueError("attention: seed must be one int64 where p is not 0")
    mask = how.mask
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"attention: mask is {mask.dtype}; torch.bool, true where a query sees a key, is needed")
    if mask.ndim != 4 or any(size not in (1, wanted) for size, wanted in zip(mask.shape, scores, strict=True)):
        raise ValueError(f"attention: mask has the shape {tuple(mask.shape)}; what becomes {scores} is needed")


def _scores(q: Tensor, keys: Tensor, how: How) -> Tensor:
    """[batch, key heads, queries' heads of each, queries, keys], fp32; -inf where a query does not see a key."""
    scores = _grouped(q, keys) @ keys.float().unsqueeze(2).transpose(3, 4) * how.scale
    if how.causal:
        queries, tokens = scores.shape[3:]
        hidden = torch.ones(queries, tokens, dtype=torch.bool, device=q.device).triu(tokens - queries + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    if how.mask is not None:
        seen = _whole(how.mask, q, keys).unflatten(1, scores.shape[1:3])
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores


def _whole(mask: Tensor, q: Tensor, keys: Tensor) -> Tensor:
    """[batch, heads, queries, keys], of the mask's own memory."""
    return mask.expand(*q.shape[:3], keys.shape[2])


def _kept(scores: Tensor, how: How) -> Tensor | None:
    """What dropout multiplies the softmaxes of `scores` by: 1 / (1 - p) or 0; None without it."""
    if not how.p:
        return None
    assert how.seed is not None
    sizes = scores.shape[:-1].numel(), scores.shape[-1]
    return dropout_factors(how.seed, *sizes, how.p, device=scores.device).reshape(scores.shape)


def _number(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed) % (1 << 64)


def _grouped(q: Tensor, keys: Tensor) -> Tensor:
    """q, or its like, in fp32, the heads that share one of keys beside each other."""
    return q.float().unflatten(1, (keys.shape[1], q.shape[1] // keys.shape[1]))


def _like(x: Tensor) -> Tensor:
    """Uninitialised, [B, H, T, D] that lies as [B, T, H, D], which is what the product that follows reads."""
    return x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2)


def reference(q: Tensor, keys: Tensor, values: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    """In fp32, rounded once; the logarithms of the softmaxes' denominators, fp32 [batch, heads, queries], with it. A
    query to which the mask shows nothing has 0, and infinity as its logarithm.
    """
    how = How(*given)
    scores = _scores(q, keys, how)
    logs = torch.logsumexp(scores, dim=-1)
    if how.mask is not None:
        logs = logs.masked_fill(logs == float("-inf"), float("inf"))
    shares, kept = torch.exp(scores - logs.unsqueeze(-1)), _kept(scores, how)
    y = (shares if kept is None else shares * kept) @ values.float().unsqueeze(2)
    return _like(q).copy_(y.reshape(q.shape)), logs.reshape(q.shape[:3])


def _by_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _places(*tensors: Tensor) -> tuple[Any, ...]:
    """Address and strides of each."""
    return tuple(each for x in tensors for each in (x.data_ptr(), x.stride()))


def _numbers(q: Tensor, keys: Tensor, how: How) -> tuple[Any, ...]:
    """What C++ takes besides operands and results."""
    sizes = (*q.shape[:2], keys.shape[1], q.shape[2], *keys.shape[2:])
    marks = (0, (0, 0, 0)) if how.mask is None else (how.mask.data_ptr(), how.mask.stride()[:3])
    drop = (how.p, _number(how.seed) if how.p else 0)
    return sizes, how.scale, how.causal, TYPES[q.dtype], torch.get_num_threads(), *marks, *drop


def _with_bytes(q: Tensor, keys: Tensor, given: tuple[Any, ...]) -> How:
    """How a call computes, its mask with a byte for every key, side by side."""
    how = How(*given)
    if how.mask is None:
        return how
    (mask,) = _by_rows(how.mask.expand(*how.mask.shape[:3], keys.shape[2]))
    return how._replace(mask=_whole(mask, q, keys))


def _compiled(function: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(q: Tensor, keys: Tensor, values: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        q, keys, values = _by_rows(q, keys, values)
        how = _with_bytes(q, keys, given)
        y, logs = _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        function(*_places(q, keys, values), y.data_ptr(), logs.data_ptr(), *_numbers(q, keys, how))
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

LIBRARY.define(f"attention(Tensor q, Tensor keys, Tensor values, {HOW}) -> (Tensor, Tensor)")


def _fake(q: Tensor, keys: Tensor, values: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


Gradients = tuple[Tensor, Tensor, Tensor]


def _describe_backward(
    grad: Tensor, q: Tensor, keys: Tensor, values: Tensor, y: Tensor, logs: Tensor, *how: Any
) -> AttentionCall:
    return describe(q, keys, values, *how)


def _check_backward(grad: Tensor, q: Tensor, keys: Tensor, values: Tensor, y: Tensor, logs: Tensor, *how: Any) -> None:
    check(q, keys, values, *how)
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
    grad: Tensor, q: Tensor, keys: Tensor, values: Tensor, y: Tensor, logs: Tensor, *given: Any
) -> Gradients:
    """With p the probabilities and m what dropout multiplies them by: grad_values = (p·m)ᵀ·grad,
    grad_scores = p·(m·(grad·valuesᵀ) − Σ grad·y); in fp32.
    """
    how = How(*given)
    scores = _scores(q, keys, how)
    shares, kept = torch.exp(scores - logs.unflatten(1, (keys.shape[1], -1)).unsqueeze(-1)), _kept(scores, how)
    of_y, queries = _grouped(grad, keys), _grouped(q, keys)
    same = (of_y * _grouped(y, keys)).sum(-1, keepdim=True)
    grad_shares = of_y @ values.float().unsqueeze(2).transpose(3, 4)
    grad_scores = shares * ((grad_shares if kept is None else grad_shares * kept) - same) * how.scale
    grad_q = (grad_scores @ keys.float().unsqueeze(2)).reshape(q.shape)
    grad_keys = (grad_scores.transpose(3, 4) @ queries).sum(2)
    grad_values = ((shares if kept is None else shares * kept).transpose(3, 4) @ of_y).sum(2)
    return _like(q).copy_(grad_q), _like(keys).copy_(grad_keys), _like(values).copy_(grad_values)


def _compiled_backward(function: Callable[..., None]) -> Callable[..., Gradients]:
    def run(grad: Tensor, q: Tensor, keys: Tensor, values: Tensor, y: Tensor, logs: Tensor, *given: Any) -> Gradients:
        grad, q, keys, values = _by_rows(grad, q, keys, values)
        y, logs, how = y.transpose(1, 2).contiguous(), logs.contiguous(), _with_bytes(q, keys, given)
        grads = _like(q), _like(keys), _like(values)
        addresses = (x.data_ptr() for x in (y, logs, *grads))
        function(*_places(grad, q, keys, values), *addresses, *_numbers(q, keys, how))
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
    f"attention_backward(Tensor grad, Tensor q, Tensor keys, Tensor values, Tensor y, Tensor logs, {HOW})"
    " -> (Tensor, Tensor, Tensor)"
)


def _fake_backward(
    grad: Tensor, q: Tensor, keys: Tensor, values: Tensor, y: Tensor, logs: Tensor, *how: Any
) -> Gradients:
    return _like(q), _like(keys), _like(values)


def _needs_grad(q: Tensor, keys: Tensor, values: Tensor, *_: Any) -> bool:
    return q.requires_grad or keys.requires_grad or values.requires_grad


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, keys, values, *given = inputs  # what is left at its default the dispatcher leaves out
    how, ctx.given = How(*given), len(given)
    ctx.how = how._replace(mask=None, seed=None)  # which are kept as tensors
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, keys, values, *output, how.mask, how.seed)


@once_differentiable
def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, mask, seed = ctx.saved_tensors
    found = torch.ops.parco.attention_backward.default(grad, *tensors, *ctx.how._replace(mask=mask, seed=seed))
    return *found, *(None for _ in range(ctx.given))


table.implement("attention_backward", _check_backward, _fake_backward)
_cpu = table.implement("attention", check, _fake)
differentiate("attention", _needs_grad, _setup, _backward)


def attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """softmax(scale · q·keysᵀ)·values for queries q [B, heads, T, D], keys and values [B, key heads, S, D]: y
    [B, heads, T, D], which lies as [B, T, heads, D]. heads / key heads of q in a row share a head of keys and values.
    All of one dtype (fp32, bf16 or fp16); in fp32, rounded once. `scale` is 1/√D where it is None. `causal`, with
    T ≤ S: the last query sees all keys, and each one before it one key less. `mask`, bool, of a shape that becomes [B,
    heads, T, S], is true where a query sees a key (if `causal` lets it); a query that sees none has 0. Tiles of 64
    queries by 64 keys that see nothing of one another are left out: examples packed in one window, a sliding window.
    Of every softmax the share `p` is dropped and the rest counts 1/(1 − p) times: a key by Philox's bits under `seed`,
    one int64, for its column and the row of its query in [B, heads, T].

    Memory beside the operands and gradients is some S·D numbers for each thread, and for the gradients 32 of them or
    32 MB more, whatever T·S; a mask whose keys are not side by side is copied. Differentiable once with respect to q,
    keys and values. Raises ValueError or TypeError naming the argument.
    """
    how = How(max(1, q.shape[-1]) ** -0.5 if scale is None else scale, causal, mask, seed, p)
    if undispatched(q, keys, values, mask, seed):
        return _cpu(q, keys, values, *how)[0]
    return torch.ops.parco.attention.default(q, keys, values, *how)[0]
