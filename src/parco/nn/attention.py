"""Puts `attention` under the name by which a fused module's forward finds PyTorch's own in Transformers.

Under `sdpa`; models that need what Transformers refuses there, as a soft cap, ask for `eager` and keep that, but for
heads with sinks (gpt-oss and what took them over): a logit of each head's softmax to which no key belongs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parco import machine
from parco.kernels.attention import attention
from parco.kernels.library import TYPES, transformed, untraced
from parco.kernels.rowwise import attend
from parco.nn import proofs
from parco.nn.proofs import Unlike

INTERFACES = "ALL_ATTENTION_FUNCTIONS"
"""Transformers' table of attention functions, as modules' forwards name it."""
OWN = "eager_attention_forward"
"""A model's own function, as its forwards name it."""
SDPA = "sdpa"
"""The name in it of PyTorch's scaled_dot_product_attention."""

_FEWEST_QUERIES = 32
"""Fewer, against more keys, are left to PyTorch's function, which then is two to three times as fast."""

_IDLE = {"position_ids", "use_cache", "cache_position", "num_items_in_batch", "sliding_window"}
"""Arguments that models hand to that function and that it does not read: what they ask for is in the mask."""


def known_in(table: Any) -> Callable[..., Any]:
    """Transformers' own function around PyTorch's attention in its table, which `attention` computes. Raises Unlike
    where the table has another, or none.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    try:
        known = table.get_interface(SDPA, None)
    except (AttributeError, KeyError) as error:  # it is no such table, or one of the forward's own
        raise Unlike(f"its {INTERFACES} has no {SDPA}") from error
    if known is not sdpa_attention_forward or not _attends_alike(known):
        raise Unlike(f"its {SDPA} is another function than Transformers'")
    return known


class Interfaces:
    """A table of attention functions in which PyTorch's computes in tiles what `attention` takes, and the model's own,
    which it hands over where the table has none, what `attend` and `attention` do of heads with sinks. Everything else
    is the original's. Raises Unlike as `known_in`.
    """

    def __init__(self, original: Any, own: Any) -> None:
        self._original, self._known = original, known_in(original)
        self._tiled = _tiled(self._known)
        self._own, self._sunk = own, _with_sinks(own) if callable(own) else own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def __getitem__(self, name: str) -> Any:
        return self._original[name]

    def get_interface(self, name: str, default: Any) -> Any:
        """The function of that name."""
        found = self._original.get_interface(name, default)
        if found is self._known:
            return self._tiled
        return self._sunk if found is self._own else found


def _tiled(original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, Transformers' function around PyTorch's attention, by `attention` where that takes the arguments and
    PyTorch's is not better at it.
    """

    def in_tiles(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> Any:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = causal if attention_mask is None else False  # the mask says it too
        changed = any(other is not None and other is not False for name, other in others.items() if name not in _IDLE)
        if not changed and 0 <= dropout < 1 and _takes(query, key, value, causal, attention_mask, dropout > 0):
            seed = torch.randint(1 << 62, (1,), device="cpu") if dropout else None
            y = attention(query, key, value, scaling, causal, attention_mask, seed, dropout)
            return y.transpose(1, 2), None
        options = {} if is_causal is None else {"is_causal": is_causal}
        return original(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options, **others
        )

    return in_tiles


def _takes(
    q: Tensor, keys: Tensor, values: Tensor, causal: object, mask: Tensor | None = None, drops: bool = False
) -> bool:
    """Whether `attention` computes this, and sooner than PyTorch's."""
    if not (q.is_cpu and keys.is_cpu and values.is_cpu) or not isinstance(causal, bool) or transformed():
        return False
    if not q.dtype == keys.dtype == values.dtype or not q.ndim == keys.ndim == values.ndim == 4:
        return False
    alike = keys.shape == values.shape and q.shape[0] == keys.shape[0] and q.shape[3] == keys.shape[3]
    whole = alike and keys.shape[1] > 0 and q.shape[1] % keys.shape[1] == 0 and q.numel() > 0
    fit = keys.shape[2] == q.shape[2] if causal else keys.shape[2] > 0
    enough = q.shape[2] >= min(_FEWEST_QUERIES, keys.shape[2])
    if not (whole and fit and enough):
        return False
    if mask is None:
        return _is_faster(q.dtype, bool(causal), drops)
    if not (mask.is_cpu and mask.dtype == torch.bool and mask.ndim == 4):
        return False
    if any(size not in (1, wanted) for size, wanted in zip(mask.shape, (*q.shape[:3], keys.shape[2]), strict=True)):
        return False
    if _is_faster(q.dtype, False, drops):
        return True
    return _is_faster(q.dtype, True, drops) and untraced(mask) and _hides_half(mask)


def _hides_half(mask: Tensor) -> bool:
    """Whether a mask hides about as much as a causal one does. Its diagonal is seen, and a few tokens are padding."""
    return 2 * int(mask.count_nonzero()) <= mask.numel() + 2 * mask.numel() // mask.shape[-1]


def _is_faster(dtype: torch.dtype, half: bool, drops: bool) -> bool:
    """Whether `attention` is faster than PyTorch's function: that multiplies bf16 and fp16 in AMX's tiles where the
    processor has them and else slowly, and fp32 by the matrix library, which keeps up unless `half` of it is hidden.
    Where a softmax `drops`, it writes whole scores.
    """
    if dtype == torch.float32:
        return (half and machine.has("avx512")) or (drops and machine.has("avx2"))
    return dtype in TYPES and machine.has("avx2") and not machine.has("amx")


@functools.cache
def _with_sinks(original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, a model's own attention function, by `attend` and `attention` where it is one of heads with sinks and
    nobody asks for gradients or the softmaxes themselves.
    """
    if not _sinks_alike(original):
        return original

    def with_sinks(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        dropout: float = 0.0,
        **others: Any,
    ) -> Any:
        sinks = getattr(module, "sinks", None)
        tensors = (query, key, value, sinks)
        trains = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)
        if not isinstance(sinks, Tensor) or trains or dropout or module._forward_hooks or sinks.dtype != query.dtype:
            y = None
        else:
            y = _sunk(query, key, value, attention_mask, scaling, sinks.detach())
        if y is None:
            return original(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others)
        return y.transpose(1, 2), None

    return with_sinks


def _sunk(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, sinks: Tensor) -> Tensor | None:
    """[batch, heads, queries, width]; None for what is not taken. `mask` is what is added to the scores."""
    if not all(each.is_cpu and each.dtype == q.dtype in TYPES for each in (q, keys, values)) or transformed():
        return None
    if not untraced(q) or q.shape[0] != keys.shape[0] or not q.numel():
        return None
    seen = None
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask == 0
        whole = seen.ndim == 4 and seen.shape[3] == keys.shape[2]
        if not whole or (seen is not mask and not bool((seen | (mask <= torch.finfo(mask.dtype).min)).all())):
            return None
    if q.shape[2] == 1 and (seen is None or bool(seen.all())):
        return attend(q[:, :, 0], keys, values, scale, 0.0, sinks).unsqueeze(2)
    if seen is None:
        return None
    y, logs = torch.ops.parco.attention.default(q, keys, values, scale, False, seen)
    return y * torch.sigmoid(logs - sinks.float().view(-1, 1)).to(y.dtype).unsqueeze(-1)


class _Plain(torch.nn.Module):
    """What Transformers' functions ask of a module that attends."""

    num_key_value_groups = 3

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.is_causal = causal
        self.sinks = torch.nn.Parameter(torch.arange(3, dtype=torch.float32, device="cpu") - 1)


@functools.cache
@torch.no_grad()
def _attends_alike(function: Any) -> bool:
    """Whether `attention` is this function, of plain arguments."""
    if list(inspect.signature(function).parameters)[:5] != ["module", "query", "key", "value", "attention_mask"]:
        return False
    like = torch.empty(0, dtype=torch.float32, device="cpu")
    q, keys, values = (proofs.random(2, heads, 5, 16, like=like, seed=heads) for heads in (3, 1, 1))
    try:
        for causal in (True, False):
            for mask in (None, torch.eye(5, dtype=torch.bool, device="cpu").expand(2, 1, 5, 5)):
                expected, _ = function(_Plain(causal), q, keys, values, mask)
                ours = attention(q, keys, values, None, causal and mask is None, mask)
                if not proofs.apart(ours.transpose(1, 2), expected) < proofs.ROUNDINGS:
                    return False
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):  # it takes other arguments
        return False
    return True


@torch.no_grad()
def _sinks_alike(function: Any) -> bool:
    """Whether `_sunk` is this function of a module with sinks."""
    like = torch.empty(0, dtype=torch.float32, device="cpu")
    q, keys, values = (proofs.random(2, heads, 5, 16, like=like, seed=heads) for heads in (3, 1, 1))
    module, hidden = _Plain(True).eval(), torch.finfo(torch.float32).min
    mask = torch.full((5, 5), hidden, device="cpu").triu(1).expand(2, 1, 5, 5)
    try:
        for few in (5, 1):
            asked, seen = q[:, :, 5 - few :], mask[:, :, 5 - few :]
            expected, _ = function(module, asked, keys, values, seen, scaling=0.4)
            ours = _sunk(asked, keys, values, seen, 0.4, module.sinks)
            if ours is None or not proofs.apart(ours.transpose(1, 2), expected) < proofs.ROUNDINGS:
                return False
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):  # it takes other arguments
        return False
    return True
