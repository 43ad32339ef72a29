"""What a decoder's layer is made of, found by the kinds of its children and the names that projections have.

Only what the children are is decided here; in which order they are applied, the proofs try out (`layers.layer`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from parco.nn.experts import is_experts
from parco.nn.linear import Linear, kind_of
from parco.nn.stored import StoredWeight

ATTENTION = ("self_attn", "attn", "attention")
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
TOGETHER = ("qkv_proj", "c_attn", "query_key_value")
OUT = ("o_proj", "c_proj", "dense", "out_proj")
HEAD_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"))
GATED = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"))
SOFTCAP = "attn_logit_softcapping"
SHARED = ("shared_expert", "shared_expert_gate")
FLAGS = {
    *("scaling", "head_dim", "head_size", "rotary_ndims", SOFTCAP, "split_size"),
    *("qk_layernorm", "use_parallel_residual", "num_key_value_heads"),
    *("top_k", "norm_topk_prob", "num_experts", "_is_expert_parallel"),
}
"""Attributes of a layer, of its attention, its router and its experts that tell what they compute."""


@dataclass(frozen=True)
class Block:
    """A feed-forward block: `gate_up`, gate and up, one matrix for both, or up alone; and `down`."""

    module: Any
    gate_up: tuple[Any, ...]
    down: Any

    @property
    def is_gated(self) -> bool:
        """Whether there is a gate beside up."""
        return gated_names(self.module) is not None

    @property
    def modules(self) -> tuple[Any, ...]:
        """Those whose forwards are not run."""
        return (self.module,)

    def fit(self, columns: int) -> bool:
        """Whether the matrices have the shapes of such a block."""
        outputs, inner = shape(self.down)
        wide = (1 + self.is_gated) * inner // len(self.gate_up)
        return outputs == columns and all(shape(each) == (wide, columns) for each in self.gate_up)


@dataclass(frozen=True)
class Mixture:
    """A block of `experts`, of which a `router` (`weight` [E, H], `top_k`) chooses some for each token; perhaps one
    that all tokens take, and a gate for it.
    """

    module: Any
    router: Any
    experts: Any
    shared: Block | None
    shared_gate: Any

    @property
    def modules(self) -> tuple[Any, ...]:
        """Those whose forwards are not run."""
        return self.module, self.router, self.experts, *(() if self.shared is None else (self.shared.module,))

    def fit(self, columns: int) -> bool:
        """Whether the matrices have the shapes of such a block."""
        count, weight = self.experts.num_experts, self.router.weight
        logits = weight.ndim == 2 and tuple(weight.shape) == (count, columns) and 0 < self.router.top_k <= count
        gate = self.shared_gate is None or shape(self.shared_gate) == (1, columns)
        shared = self.shared is None or (self.shared.is_gated and self.shared.fit(columns))
        return logits and gate and shared and self.experts.down_proj[0].shape[0] == columns


@dataclass(frozen=True)
class Parts:
    """A decoder's layer: its attention, the `norms` of both halves in the order of their registration and those of
    queries and keys; what is multiplied: `qkv` (three matrices or one), `out`, and what stands in the feed-forward
    block's place; what does something else, or nothing, where nobody trains.
    """

    attention: Any
    norms: tuple[Any, ...]
    of_heads: tuple[Any, ...]
    qkv: tuple[Any, ...]
    out: Any
    block: Block | Mixture
    training: tuple[nn.Module, ...]
    flags: tuple[tuple[str, Any], ...]

    @property
    def width(self) -> int:
        """Numbers of a head."""
        return _width(self.attention)

    @property
    def heads(self) -> tuple[int, int]:
        """Heads of queries, and of keys and values."""
        heads = shape(self.out)[1] // self.width
        if len(self.qkv) == 3:
            return heads, shape(self.qkv[1])[0] // self.width
        return heads, (shape(self.qkv[0])[0] // self.width - heads) // 2

    @property
    def columns(self) -> int:
        """Numbers in x."""
        return shape(self.out)[0]

    def fit(self) -> bool:
        """Whether the matrices have the shapes of attention and of feed-forward blocks."""
        width, (heads, key_heads), columns = self.width, self.heads, self.columns
        of_keys = key_heads * width
        rows = [heads * width, of_keys, of_keys] if len(self.qkv) == 3 else [heads * width + 2 * of_keys]
        found, wanted = [shape(each) for each in self.qkv], [(count, columns) for count in rows]
        whole = key_heads > 0 and heads % key_heads == 0
        return whole and found == wanted and shape(self.out)[1] == heads * width and self.block.fit(columns)


def parts(module: nn.Module) -> Parts | None:
    """The parts of `module`, or None where it is no such layer."""
    children: dict[str, Any] = dict(module.named_children())
    attention = next((children.pop(name) for name in ATTENTION if name in children), None)
    feed_forward = children.pop("mlp", None)
    if attention is None or feed_forward is None or not _width(attention) or "layer_idx" not in attention.__dict__:
        return None
    norms = tuple(each for each in children.values() if is_norm(each))
    inner: dict[str, Any] = dict(attention.named_children())
    names = PROJECTIONS if PROJECTIONS[0] in inner else TOGETHER
    qkv = tuple(inner.pop(name) for name in names if name in inner)
    out = next((inner.pop(name) for name in OUT if name in inner), None)
    of_heads = tuple(inner.pop(name) for pair in HEAD_NORMS if set(pair) <= inner.keys() for name in pair)
    found = mixture(feed_forward) or block(feed_forward)
    if len(qkv) not in (1, 3) or out is None or found is None or not all(is_linear(each) for each in (*qkv, out)):
        return None
    others = [*(each for each in children.values() if each not in norms), *inner.values()]
    training = [each for each in (*others, *feed_forward.children()) if kind_of(each) is nn.Dropout]
    if any(each not in training for each in others):
        return None
    if isinstance(found, Mixture):
        training.append(feed_forward)
    flags = tuple((name, owner.__dict__[name]) for owner, name in flagged(module, attention, found))
    return Parts(attention, norms, of_heads, qkv, out, found, tuple(training), flags)


def flagged(module: Any, attention: Any, found: Block | Mixture) -> Iterator[tuple[Any, str]]:
    """The attributes of a layer's parts that tell what they compute, by owner and name."""
    owners = (module, attention, *((found.router, found.experts) if isinstance(found, Mixture) else ()))
    for owner in owners:
        for name in sorted(FLAGS & owner.__dict__.keys()):
            yield owner, name


def block(feed_forward: nn.Module) -> Block | None:
    """The block's matrices, where all of them are linear layers."""
    found = matrices(feed_forward)
    if found is None or not all(is_linear(each) for each in (*found[0], found[1])):
        return None
    return Block(feed_forward, *found)


def mixture(feed_forward: nn.Module) -> Mixture | None:
    """The parts of a block of experts, or None where it is none or has others."""
    children: dict[str, Any] = dict(feed_forward.named_children())
    router = children.pop("gate", None)
    experts, shared, gate = (children.pop(name, None) for name in ("experts", *SHARED))
    if children or experts is None or not is_experts(experts) or "top_k" not in getattr(router, "__dict__", {}):
        return None
    held = None if shared is None else block(shared)
    if (shared is not None and held is None) or (gate is not None and not is_linear(gate)):
        return None
    weight: Any = getattr(router, "weight", None)
    return Mixture(feed_forward, router, experts, held, gate) if isinstance(weight, Tensor) else None


def _width(attention: Any) -> int:
    return attention.__dict__.get("head_dim") or attention.__dict__.get("head_size") or 0


def gated_names(feed_forward: nn.Module) -> tuple[str, ...] | None:
    """The names of gate and up (one or two), and down, where the block has them."""
    children = dict(feed_forward.named_children())
    return next((names for names in GATED if set(names) <= children.keys()), None)


def matrices(feed_forward: nn.Module) -> tuple[tuple[Any, ...], Any] | None:
    """Gate and up, or up alone, and down; None where the block has other matrices."""
    names = gated_names(feed_forward)
    if names is not None:
        found: list[Any] = [feed_forward.get_submodule(name) for name in names]
    else:
        found = [each for each in feed_forward.children() if is_linear(each)]
    return (tuple(found[:-1]), found[-1]) if names is not None or len(found) == 2 else None


def is_norm(module: nn.Module) -> bool:
    """Whether this is of a kind of norm for which there are proofs."""
    return type(module) is nn.LayerNorm or is_rms_norm(module)


def is_rms_norm(module: nn.Module) -> bool:
    """Whether this is an RMS norm by its name."""
    return "RMSNorm" in type(module).__name__


def is_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer: parco's, PyTorch's or Transformers' Conv1D."""
    return isinstance(module, Linear) or kind_of(module) is nn.Linear or is_conv1d(module)


def is_conv1d(module: Any) -> bool:
    """Whether this is Transformers' Conv1D, a linear layer that holds its matrix transposed."""
    return kind_of(module).__name__ == "Conv1D" and hasattr(module, "nf")


def shape(layer: Any) -> tuple[int, int]:
    """(N, K) of a linear layer, as in y = x Wᵀ."""
    weight: Tensor | StoredWeight = layer.weight
    first, second = weight.shape
    return (second, first) if is_conv1d(layer) else (first, second)


def rows(layer: Any) -> Tensor:
    """The matrix [N, K] of a linear layer that holds one densely, a view."""
    return layer.weight.t() if is_conv1d(layer) else layer.weight
