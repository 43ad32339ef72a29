"""A decoder's layer of Llama's kind, for one token in one call of compiled code (csrc/decode).

In a model of a few billion bytes the interpreter's own code and data leave the cache between two products, and each of
a layer's twenty operations pays for bringing them back. Where a layer is what the proofs say, its weights are of kinds
that compiled kernels read, and nothing else is asked of it (no gradients, hooks, tracing, masks, other caches), a token
takes one call; everything else goes the way of the modules.

What a call needs is prepared once and kept beside the layer: addresses of tensors, and what shows that they are still
right. Layers that follow one another are computed in the same call, as far as they did so for the token before; each
hands out its own result when it is asked, and computes anew when it is asked for something else.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from parco import _C
from parco.kernels.library import undispatched
from parco.nn import proofs
from parco.nn.linear import kind_of
from parco.nn.prepared import NORMS, PROJECTIONS, Prepared, Settings, prepare
from parco.nn.proofs import Unlike
from parco.nn.room import Room, appendable, room_for_one, written

STATE = "_parco_state"
"""The attribute of a layer that holds its State, which copies do not take along."""

_LAYER_NAMES = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION_NAMES = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "head_dim", "layer_idx", "scaling", "config"),
    *("shape", "view", "transpose", "reshape", "contiguous", "update", "training", "attention_dropout"),
    *("ALL_ATTENTION_FUNCTIONS", "get_interface", "_attn_implementation", "eager_attention_forward"),
    *("getattr", "sliding_window", proofs.ROTARY),
}
"""What the forwards of a layer and of its attention may name. `sliding_window` only tells how long the cache is."""

_ARGUMENTS = {
    *("attention_mask", "position_embeddings", "position_ids", "past_key_values", "use_cache", "cache_position"),
}
"""What a model hands to its layers while it decodes."""


def _unwrapped(kind: type) -> Any:
    """The forward of a layer's class without Transformers' own wrapper, which checkpoints while training."""
    forward: Any = kind.forward  # pyright: ignore
    inner = getattr(forward, "__wrapped__", None)
    ours = inner is not None and forward.__globals__.get("__name__") == "transformers.modeling_layers"
    return inner if ours else forward


def _hooked_everywhere() -> bool:
    """Whether PyTorch calls hooks of every module."""
    return bool(module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks)  # pyright: ignore


def looks_like_layer(module: nn.Module) -> bool:
    """Whether this is a layer whose parts have the names of Llama's, and whose forwards name nothing else."""
    children = dict(module.named_children())
    if set(children) != _LAYER_NAMES or "forward" in module.__dict__:
        return False
    attention = children["self_attn"]
    if not {"gate_proj", "up_proj", "down_proj"} <= set(dict(children["mlp"].named_children())):
        return False
    inner = {name for name, _ in attention.named_children()}
    if inner - set(NORMS) != {*PROJECTIONS, "o_proj"} or len(inner & set(NORMS)) == 1:
        return False
    forward = _unwrapped(type(module))
    named = {*forward.__code__.co_names, *forward.__code__.co_freevars}
    plain = not (module._parameters or module._buffers or attention._parameters or attention._buffers)  # pyright: ignore
    wrapped = hasattr(forward, "__wrapped__") or "forward" in attention.__dict__
    return plain and not wrapped and named <= _LAYER_NAMES and proofs.named_by(type(attention)) <= _ATTENTION_NAMES


def layer(module: nn.Module, proven: Mapping[nn.Module, Any]) -> Settings:
    """The settings of a layer that computes what the compiled one does, from those `proven` of its parts. Raises
    Unlike.
    """
    parts: Any = module
    attention = parts.self_attn
    norms = [parts.input_layernorm, parts.post_attention_layernorm]
    norms += [getattr(attention, name) for name in NORMS if name in attention._modules]
    inside = (attention, parts.mlp, *norms)
    for part in inside:
        if part not in proven:
            raise Unlike(f"its {type(part).__name__} is not fused")
    numbers = [proven[norm] for norm in norms]
    kinds = tuple(map(kind_of, inside))
    found = Settings(numbers[0], numbers[1], tuple(numbers[2:]), proven[parts.mlp], kinds)
    weight = norms[0].weight
    if prepare(module, found, weight.dtype, attention.head_dim).call is None:
        return found  # of matrices that no compiled kernel reads now; perhaps later
    for magnitude in proofs.MAGNITUDES:
        x = proofs.random(1, 1, weight.shape[0], like=weight) * magnitude
        expected = _probed(module, x, lambda x, named: type(module).forward(module, x, **named))
        ours = _probed(module, x, lambda x, named: decoded(module, found, x, named))
        for mine, theirs in zip(ours, expected, strict=True):
            if not proofs.apart(mine, theirs) < LAYER_ROUNDINGS:
                raise Unlike(f"{type(module).__name__} computes something else than its parts in Llama's order")
    return found


LAYER_ROUNDINGS = 8.0
"""How far apart a layer and its parts may be, as `proofs.ROUNDINGS`: its two halves are four steps each, one after the
other, and where x is small nothing hides them. Seen: up to 6 in fp32, 2 in bf16.
"""


def _probed(module: Any, x: Tensor, run: Callable[..., Any]) -> tuple[Tensor, Tensor, Tensor]:
    """What `run(x, arguments)` gives after a few tokens, and the last token's key and value."""
    from transformers.cache_utils import DynamicCache

    attention = module.self_attn
    width = attention.head_dim
    heads = attention.k_proj.out_features // width
    cache = DynamicCache()
    index = attention.layer_idx
    keys, values = (proofs.random(1, heads, 5, width, like=x, seed=seed) for seed in (1, 2))
    cache.update(keys, values, index)
    half = proofs.random(1, 1, width // 2, like=x, seed=3).float()
    angles = tuple(torch.cat((f(half), f(half)), dim=-1).to(x.dtype) for f in (torch.cos, torch.sin))
    with torch.inference_mode():
        y = run(x, {"attention_mask": None, "past_key_values": cache, "use_cache": True, "position_embeddings": angles})
    if not isinstance(y, Tensor):
        raise Unlike(f"{type(module).__name__} returns something else")
    last = cache.layers[index]
    assert last.keys is not None and last.values is not None
    return y, last.keys[:, :, 5:], last.values[:, :, 5:]


def layer_forward(original: type[nn.Module]) -> Callable[..., Any]:
    """A forward that decodes in one call where it can, and is the original's elsewhere."""

    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        if len(inputs) == 1 and not torch.compiler.is_compiling():
            y = decoded(self, self._fusion, inputs[0], named)
            if y is not None:
                return y
        return original.forward(self, *inputs, **named)

    return forward


class State:
    """What is known of a layer besides its parameters: its call, and the layer that took its result last time."""

    __slots__ = ("following", "prepared", "token")

    def __init__(self) -> None:
        self.prepared: Prepared | None = None
        self.following: weakref.ref[Any] | None = None
        self.token: Token | None = None


class Token:
    """A token on its way through `layers`, all of which have been computed ahead: `results` of those that have not been
    asked for yet, and the rooms of their cache, where keys and values are already written.

    Nothing of it is used unless the next layer is asked for what was computed: with the very tensor that the one before
    gave, as it was given, the same cache and the same angles.
    """

    __slots__ = ("angles", "cache", "done", "layers", "results", "rooms", "version")

    def __init__(self, layers: list[Any], results: list[Tensor], rooms: list[Any], cache: Any, angles: Any) -> None:
        self.layers, self.results, self.rooms = layers, results, rooms
        self.cache, self.angles = cache, angles
        self.version = results[0]._version
        self.done = 0
        for _, room in rooms:
            room.ahead = self

    def leads_to(self, module: Any, done: int, cache: Any, angles: Any) -> bool:
        """Whether `module` is next, asked with what the layer number `done` gave."""
        return done == self.done and self.layers[done] is module and self.cache is cache and self.angles is angles

    @property
    def is_ahead(self) -> bool:
        """Whether the next layer's key and value are still behind what its cache holds."""
        layer, room = self.rooms[self.done]
        return room.ahead is self and layer.keys is room.views[0] and layer.values is room.views[1]

    def take(self) -> Tensor:
        """The result of the next layer, whose key and value are then the cache's."""
        y = self.results[self.done]
        written(*self.rooms[self.done])
        self.results[self.done] = self.rooms[self.done] = None  # pyright: ignore
        self.done += 1
        if self.done == len(self.layers):
            self.cache = self.angles = None
        y._parco_token = self, self.done  # pyright: ignore[reportAttributeAccessIssue]
        return y


def decoded(module: Any, settings: Settings, x: Tensor, named: dict[str, Any]) -> Tensor | None:
    """The layer's result for one token, with its key and value appended; None where it takes the modules."""
    cache, angles = named.get("past_key_values"), named.get("position_embeddings")
    if cache is None or angles is None or named.get("attention_mask") is not None or not named.keys() <= _ARGUMENTS:
        return None
    before: tuple[Token, int] | None = getattr(x, "_parco_token", None)
    if before is not None:
        token, done = before
        if done == len(token.layers):
            _state(token.layers[-1]).following = weakref.ref(module)
        elif token.leads_to(module, done, cache, angles) and x._version == token.version and token.is_ahead:
            return token.take()
    cos, sin = angles
    if x.shape[:-1] != (1, 1) or not x.is_contiguous() or not undispatched(x, cos, sin):
        return None
    if torch.is_autocast_enabled("cpu") or _hooked_everywhere():
        return None
    ready: list[_C.DecoderLayer] = []
    rooms: list[tuple[Any, Room]] = []
    layers = _expected(module)
    for layer in layers:
        found = _ready(layer, layer._fusion if layer is not module else settings, x, angles, cache)
        if found is None:
            break
        ready.append(found[0])
        rooms.append(found[1:])
    if not ready:
        return None
    token = Token(layers[: len(ready)], _run(ready, rooms, x, cos, sin), rooms, cache, angles)
    _state(module).token = token
    return token.take()


def _run(
    ready: list[_C.DecoderLayer], rooms: list[tuple[Any, Room]], x: Tensor, cos: Tensor, sin: Tensor
) -> list[Tensor]:
    """The results of the layers, one after the other, in one call."""
    with torch.inference_mode(False):  # whose tensors count their changes
        y = torch.empty((len(ready), *x.shape), dtype=x.dtype)
        results = list(y.unbind())
    held = [room for _, room in rooms]
    _C.run_layers(
        ready,
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        y.data_ptr(),
        [room.keys.data_ptr() for room in held],
        [room.values.data_ptr() for room in held],
        [room.used for room in held],
        [room.keys.stride(1) for room in held],
        [room.values.stride(1) for room in held],
        torch.get_num_threads(),
    )
    return results


def _expected(module: Any) -> list[Any]:
    """`module` and the layers that will probably follow: those that did for the last token, as far as it came."""
    state = _state(module)
    last, state.token = state.token, None
    if last is not None and last.done < len(last.layers):
        _state(last.layers[last.done - 1]).following = None
    layers = [module]
    while not (layers[-1]._forward_hooks or state.following is None):
        layer = state.following()
        if layer is None or layer._forward_pre_hooks or any(layer is each for each in layers):
            break
        layers.append(layer)
        state = _state(layer)
    return layers


def _state(module: Any) -> State:
    state = module.__dict__.get(STATE)
    if state is None:
        state = module.__dict__[STATE] = State()
    return state


def _ready(
    module: Any, settings: Settings, x: Tensor, angles: Any, cache: Any
) -> tuple[_C.DecoderLayer, Any, Room] | None:
    """(the call, the cache's layer, its room) where this layer can decode x now, else None."""
    attention = module._modules["self_attn"]
    width = attention.head_dim
    if module.training or attention.training or attention.config._attn_implementation not in ("sdpa", "eager"):
        return None
    state = _state(module)
    ready = state.prepared
    if ready is None or not ready.holds or ready.dtype != x.dtype:
        ready = state.prepared = prepare(module, settings, x.dtype, width)
    if ready.call is None or any(ready.hooks) or x.shape[-1] != ready.columns:
        return None
    for angle in angles:
        if angle.shape != (1, 1, width) or angle.dtype != x.dtype or not angle.is_contiguous():
            return None
    layer = appendable(cache, attention.layer_idx, ready.key_heads, width, x.dtype)
    return None if layer is None else (ready.call, layer, room_for_one(layer))
