"""Which decoder layers are computed in one call (`decode`): those whose forwards name nothing but their parts, and
which give on random numbers what the compiled layer gives in one of the known orders of these parts.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parco.nn import mixture, proofs
from parco.nn.decode import State, decoded, unwrapped
from parco.nn.linear import kind_of
from parco.nn.parts import (
    HEAD_NORMS,
    OUT,
    PROJECTIONS,
    SOFTCAP,
    TOGETHER,
    Block,
    Mixture,
    Parts,
    is_rms_norm,
    parts,
)
from parco.nn.prepared import Settings, Wiring, kinds, prepare
from parco.nn.proofs import Unlike

_LAYER_NAMES = {"use_parallel_residual", "crossattention", "ln_cross_attn", "hasattr", "ValueError"}
ATTENTION_NAMES = {
    *PROJECTIONS,
    *TOGETHER,
    *OUT,
    *(name for pair in HEAD_NORMS for name in pair),
    *("head_dim", "head_size", "layer_idx", "scaling", "config", "rotary_ndims", "split_size", "qk_layernorm"),
    *("num_attention_heads", "num_key_value_heads", SOFTCAP),
    *("shape", "view", "transpose", "reshape", "contiguous", "chunk", "split", "torch", "cat"),
    *("ALL_ATTENTION_FUNCTIONS", "get_interface", "_attn_implementation", "eager_attention_forward"),
    *("reorder_and_upcast_attn", "_upcast_and_reordered_attn"),
    *("training", "attention_dropout", "attn_dropout", "resid_dropout", "p"),
    *("update", "EncoderDecoderCache", "is_updated", "cross_attention_cache", "self_attention_cache", "q_attn"),
    *("layers", "keys", "values", "get", "getattr", "hasattr", "isinstance", "ValueError"),
    *("sliding_window", proofs.ROTARY),
}
"""What the forwards of a layer, besides its children, and of its attention may name. `sliding_window` only tells how
long the cache is; other states than the sequence's own are asked of no layer that is computed here.
"""


def looks_like_layer(module: nn.Module) -> bool:
    """Whether this is a layer of known parts, whose forwards name nothing else."""
    found = parts(module)
    if found is None or len(found.norms) not in _PARALLEL:
        return False
    forward, attention = unwrapped(type(module)), found.attention
    named = {*forward.__code__.co_names, *forward.__code__.co_freevars} - dict(module.named_children()).keys()
    plain = not (module._parameters or module._buffers or attention._parameters or attention._buffers)  # pyright: ignore
    replaced = hasattr(forward, "__wrapped__") or "forward" in module.__dict__ or "forward" in attention.__dict__
    return plain and not replaced and named <= _LAYER_NAMES and proofs.named_by(kind_of(attention)) <= ATTENTION_NAMES


_PARALLEL = {1: (True,), 2: (False, True), 4: (False,)}
"""By the number of a layer's norms, whether attention and feed-forward block may both read x."""


def _settings(found: Parts, proven: Mapping[nn.Module, Any]) -> Iterator[Settings]:
    """Every way in which these parts may make a layer. Raises Unlike where one of them is not proven."""
    named = proofs.named_by(kind_of(found.attention))
    turns = proofs.ROTARY in named
    blocks = _to_be_proven(found.block)
    layer_norms = {each: proofs.layer_norm(each) for each in (*found.norms, *found.of_heads) if not is_rms_norm(each)}
    proven = {**proven, **layer_norms}
    for part in (*found.norms, *found.of_heads, *blocks, *((found.attention,) if turns else ())):
        if part not in proven:
            raise Unlike(f"its {type(part).__name__} is not fused")
    if any(part.training for part in found.training):
        raise Unlike("it is being trained, with dropout or noise")
    turning = 0
    if turns:
        rotation: Any = getattr(found.attention.config, "rope_parameters", None) or {}
        part = float(rotation.get("partial_rotary_factor") or 1.0)
        turning = found.attention.__dict__.get("rotary_ndims", int(found.width * part))
        turning += turning % 2  # as frequencies for pairs are made
    activations = {proven[block] for block in blocks} if blocks else {proofs.plain(found.block.module)}
    if len(activations) != 1:
        raise Unlike("its feed-forward blocks have several activations")
    (activation,) = activations
    normalized = isinstance(found.block, Mixture) and mixture.weighs(found.block, activation)
    heads, key_heads = found.heads
    mixed = len(found.qkv) == 1 and heads == key_heads and not found.of_heads
    interleavings = (False, True) if mixed else (False,)
    for parallel, interleaved in itertools.product(_PARALLEL[len(found.norms)], interleavings):
        yield Settings(
            norms=tuple(proven[norm] for norm in found.norms),
            of_heads=tuple(proven[norm] for norm in found.of_heads),
            wiring=Wiring(parallel, interleaved),
            activation=activation,
            normalized=normalized,
            turning=turning,
            softcap=(dict(found.flags)[SOFTCAP] or 0.0) if SOFTCAP in named else 0.0,
            kinds=kinds(found),
            flags=found.flags,
        )


def _to_be_proven(block: Block | Mixture) -> tuple[nn.Module, ...]:
    """The gated feed-forward blocks that have been fused by themselves."""
    if isinstance(block, Mixture):
        return (block.experts, *(() if block.shared is None else (block.shared.module,)))
    return (block.module,) if block.is_gated else ()


def layer(module: nn.Module, proven: Mapping[nn.Module, Any]) -> Settings:
    """The settings of a layer that computes what the compiled one does, from those `proven` of its parts. Raises
    Unlike.
    """
    try:
        return _proved(module, proven)
    finally:
        module.__dict__.pop(proofs.STATE, None)  # which holds tensors, and cannot be copied with an unfused module


def _proved(module: nn.Module, proven: Mapping[nn.Module, Any]) -> Settings:
    found = parts(module)
    assert found is not None
    weight = found.norms[0].weight
    if not found.fit():
        raise Unlike("its matrices have other shapes than those of attention and of a feed-forward block")
    norms = (*found.norms, *found.of_heads)
    with proofs.disturbed((each for norm in norms for each in norm.parameters()), 1 / 4):
        inputs = [
            [proofs.random(1, 1, found.columns, like=weight, seed=seed) * magnitude for seed in _seeds(found)]
            for magnitude in proofs.MAGNITUDES
        ]
        expected: dict[int, tuple[Tensor, ...]] = {}
        for settings in _settings(found, proven):
            state = module.__dict__[proofs.STATE] = State()
            state.prepared = prepare(module, settings, weight.dtype)  # what `decoded` uses then
            if state.prepared.call is None:
                raise Unlike("no compiled kernel takes its matrices or norms")

            def agree(x: Tensor, settings: Settings = settings) -> bool:
                if id(x) not in expected:
                    expected[id(x)] = _probed(
                        found, x, settings.turning, lambda x, named: type(module).forward(module, x, **named)
                    )
                ours = _probed(found, x, settings.turning, lambda x, named: decoded(module, settings, x, named))
                pairs = zip(ours, expected[id(x)], strict=True)
                most = proofs.most_apart(LAYER_ROUNDINGS, x.dtype)
                return all(proofs.apart(mine, theirs) < most for mine, theirs in pairs)

            if all(any(map(agree, of_magnitude)) for of_magnitude in inputs):
                return settings
    raise Unlike(f"{type(module).__name__} computes something else than its parts in any known order")


def _seeds(found: Parts) -> range:
    """Of the numbers that are tried. One try must agree: where experts are chosen, a rounding before them may choose
    others, which has nothing to do with how a layer is made.
    """
    return range(4 if isinstance(found.block, Mixture) else 1)


LAYER_ROUNDINGS = 8.0
"""How far apart a layer and its parts may be, as `proofs.ROUNDINGS`: its two halves are four steps each, one after the
other, and where x is small nothing hides them. Seen: up to 6 in fp32 of small layers, 2 in bf16.
"""


def _probed(found: Parts, x: Tensor, turning: int, run: Callable[..., Any]) -> tuple[Tensor, Tensor, Tensor]:
    """What `run(x, arguments)` gives after a few tokens, and the last token's key and value."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    index = found.attention.layer_idx
    keys, values = (proofs.random(1, found.heads[1], 5, found.width, like=x, seed=seed) for seed in (1, 2))
    cache.update(keys, values, index)
    named: dict[str, Any] = {"attention_mask": None, "use_cache": True}
    named[_cache_name(found.attention)] = cache
    if turning:
        half = proofs.random(1, 1, turning // 2, like=x, seed=3).float()
        angles = tuple(torch.cat((f(half), f(half)), dim=-1).to(x.dtype) for f in (torch.cos, torch.sin))
        named["position_embeddings"] = angles
    with torch.inference_mode():
        y = run(x, named)
    if not isinstance(y, Tensor):
        raise Unlike("it returns something else than a tensor")
    last = cache.layers[index]
    assert last.keys is not None and last.values is not None
    return y, last.keys[:, :, 5:], last.values[:, :, 5:]


def _cache_name(attention: Any) -> str:
    """What attention calls the cache."""
    named = inspect.signature(kind_of(attention).forward).parameters
    return "layer_past" if "layer_past" in named else "past_key_values"
