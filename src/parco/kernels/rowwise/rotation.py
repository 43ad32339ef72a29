"""rotate: rotary position embedding of queries and keys (Su et al., arXiv 2104.09864), halves paired as in GPT-NeoX."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parco import _C, machine
from parco.kernels import table
from parco.kernels.library import LIBRARY, TYPES, check_float, differentiate, undispatched


class RotationCall(NamedTuple):
    """One call of rotate on heads of `columns` numbers of `dtype`."""

    device: str
    isa: str
    dtype: torch.dtype
    queries: int
    columns: int

    def __str__(self) -> str:
        return f"{self.queries} queries of {self.columns} numbers of {self.dtype}, and their keys"


def describe(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> RotationCall:
    """The table's key of a call."""
    columns = q.shape[-1]
    return RotationCall(q.device.type, machine.isa(), q.dtype, q.numel() // max(columns, 1), columns)


def check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit together."""
    check_float("rotate", "q", q)
    if q.ndim != 4:
        raise ValueError(f"rotate: q has the shape {tuple(q.shape)}; [batch, heads, tokens, columns] is needed")
    batch, _, tokens, columns = q.shape
    if k.ndim != 4 or (k.shape[0], *k.shape[2:]) != (batch, tokens, columns):
        raise ValueError(
            f"rotate: k has the shape {tuple(k.shape)}; [{batch}, heads, {tokens}, {columns}], as q, is needed"
        )
    if k.dtype != q.dtype:
        raise TypeError(f"rotate: k is {k.dtype}; {q.dtype}, which q is, is needed")
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor.dtype != cos.dtype or cos.dtype not in (q.dtype, torch.float32):
            raise TypeError(f"rotate: {name} is {tensor.dtype}; {q.dtype}, which q is, or float32 is needed")
    turning = cos.shape[-1] if cos.ndim else 0
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor.ndim != 3 or tensor.shape[0] not in (1, batch) or tuple(tensor.shape[1:]) != (tokens, turning):
            raise ValueError(
                f"rotate: {name} has the shape {tuple(tensor.shape)}; [{batch} or 1, {tokens}, {turning}] is needed"
            )
    if turning % 2 or turning > columns:
        raise ValueError(f"rotate: cos has {turning} columns; an even number up to {columns}, as q has, is needed")


def _halves_turned(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, H, T, D] turned by [B, T, R], in the strides of `_like`."""
    cos, sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    turning = cos.shape[-1]
    wide = x[..., :turning].float()
    turned = (wide * cos + _halves_turned(wide) * sin).to(x.dtype)
    return _like(x).copy_(torch.cat((turned, x[..., turning:]), dim=-1))


def _like(x: Tensor) -> Tensor:
    """Uninitialised, [B, H, T, D] that lies as [B, T, H, D], which is how products give heads."""
    return x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2)


def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """In fp32, rounded once."""
    return _turned(q, cos, sin), _turned(k, cos, sin)


def _compiled(function: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = _within_rows(q), _within_rows(k)
        cos, sin = cos.contiguous(), sin.contiguous()
        batch, heads, tokens, columns = q.shape
        turning, key_heads = cos.shape[-1], k.shape[1]
        turned_q, turned_k = _like(q), _like(k)
        function(
            q.data_ptr(),
            q.stride(),
            heads,
            turned_q.data_ptr(),
            k.data_ptr(),
            k.stride(),
            key_heads,
            turned_k.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            cos.shape[0] == 1,
            batch,
            tokens,
            turning,
            columns - turning,
            TYPES[q.dtype],
            TYPES[cos.dtype],
            torch.get_num_threads(),
        )
        return turned_q, turned_k

    return run


def _within_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _refuses(call: RotationCall) -> str | None:
    return None if call.queries else "there are no queries"


table.register(
    table.Operation(
        "rotate",
        describe,
        (
            table.Kernel("rotate-avx512", "avx512", _compiled(_C.rotate_avx512), _refuses),
            table.Kernel("rotate-avx2", "avx2", _compiled(_C.rotate_avx2), _refuses),
            table.Kernel("rotate-generic", "generic", _compiled(_C.rotate_generic), _refuses),
            table.Kernel("rotate-torch", table.TORCH, reference),
        ),
    )
)

LIBRARY.define("rotate(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)")


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _like(q), _like(k)


def _needs_grad(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    return q.requires_grad or k.requires_grad


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[2:])


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    """The transpose of a rotation is a rotation: the other way, with the sines of its halves exchanged."""
    cos, sin = ctx.saved_tensors
    low, high = sin.chunk(2, dim=-1)
    back = torch.cat((-high, -low), dim=-1)
    return *torch.ops.parco.rotate.default(grad_q, grad_k, cos, back), None, None


_cpu = table.implement("rotate", check, _fake)
differentiate("rotate", _needs_grad, _setup, _backward)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries q and keys k [B, heads, T, D], their first R columns turned by the angles whose cosines and sines are
    [B or 1, T, R], R ≤ D: pair i is (x[i], x[i + R/2]). q and k are of one dtype (fp32, bf16 or fp16), cosines and
    sines of that or fp32; in fp32, rounded once.

    Differentiable with respect to q and k. Raises ValueError or TypeError naming the argument.
    """
    if undispatched(q, k, cos, sin):
        return _cpu(q, k, cos, sin)
    return torch.ops.parco.rotate.default(q, k, cos, sin)
