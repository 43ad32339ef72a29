"""A decoder's layer, for one token in one call of compiled code (csrc/decode).

In a model of a few billion bytes the interpreter's own code and data leave the cache between two products, and each of
a layer's twenty operations pays for bringing them back. Where a layer is what the proofs say, its weights are of kinds
that compiled kernels read, and nothing else is asked of it (no gradients, hooks, tracing, masks, other caches), a token
takes one call; everything else goes the way of the modules.

What a call needs is prepared once and kept beside the layer: addresses of tensors, and what shows that they are still
right. Layers that follow one another are computed in the same call, as far as they did so for the token before; each
hands out its own result when it is asked, and computes anew when it is asked for something else.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parco import _C
from parco.kernels.library import undispatched
from parco.nn import mixture, proofs
from parco.nn.prepared import Prepared, Settings, prepare
from parco.nn.room import Room, appendable, room_for_one, written

_ARGUMENTS = {
    *("attention_mask", "position_embeddings", "position_ids", "past_key_values", "use_cache", "cache_position"),
    "layer_past",
}
"""What a model hands to its layers while it decodes, besides None and what is not wanted."""


def unwrapped(kind: type) -> Any:
    """The forward of a layer's class without Transformers' own wrapper, which checkpoints while training."""
    forward: Any = kind.forward  # pyright: ignore
    inner = getattr(forward, "__wrapped__", None)
    ours = inner is not None and forward.__globals__.get("__name__") == "transformers.modeling_layers"
    return inner if ours else forward


def layer_forward(original: type[nn.Module]) -> Callable[..., Any]:
    """A forward that decodes in one call where it can, and is the original's elsewhere."""
    names = tuple(inspect.signature(unwrapped(original)).parameters)[2:]

    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        if inputs and not torch.compiler.is_compiling():
            x, *others = inputs
            asked = {**dict(zip(names, others, strict=False)), **named} if others else named
            y = decoded(self, self._fusion, x, asked)
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
            self.cache = None
        y._parco_token = self, self.done  # pyright: ignore[reportAttributeAccessIssue]
        return y


def decoded(module: Any, settings: Settings, x: Tensor, named: dict[str, Any]) -> Tensor | None:
    """The layer's result for one token, with its key and value appended; None where it takes the modules."""
    cache, angles = named.get("past_key_values"), named.get("position_embeddings")
    if cache is None:
        cache = named.get("layer_past")
    if cache is None or (angles is None) != (settings.turning == 0):
        return None
    if not named.keys() <= _ARGUMENTS and any(map(_asks, named.keys() - _ARGUMENTS, itertools.repeat(named))):
        return None
    mask = named.get("attention_mask")
    before: tuple[Token, int] | None = getattr(x, "_parco_token", None)
    if before is not None:
        token, done = before
        if done == len(token.layers):
            if token.angles is angles:
                _state(token.layers[-1]).following = weakref.ref(module)
        elif token.leads_to(module, done, cache, angles) and x._version == token.version and token.is_ahead:
            return token.take() if _hides_nothing(mask) and _fits(mask, token.rooms[done][1]) else None
    if x.shape[:-1] != (1, 1) or not x.is_contiguous() or not undispatched(x, *(angles or ())):
        return None
    if torch.is_autocast_enabled("cpu") or proofs.hooked_everywhere() or not _hides_nothing(mask):
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
    if not ready or not _fits(mask, rooms[0][1]):
        return None
    token = Token(layers[: len(ready)], _run(ready, rooms, x, angles), rooms, cache, angles)
    _state(module).token = token
    return token.take()


def _asks(name: str, named: dict[str, Any]) -> bool:
    """Whether this argument asks for more than a result."""
    value = named[name]
    return value is not None and not (value is False and name == "output_router_logits")


def _hides_nothing(mask: Any) -> bool:
    """Whether one token sees all that the mask is for."""
    if mask is None:
        return True
    if not isinstance(mask, Tensor) or mask.shape[:-1] != (1, 1, 1):
        return False
    return bool(mask.all()) if mask.dtype == torch.bool else not mask.any()


def _fits(mask: Tensor | None, room: Room) -> bool:
    """Whether the mask is for the tokens of the cache and the next one."""
    return mask is None or mask.shape[-1] == room.known + 1


def _run(ready: list[_C.DecoderLayer], rooms: list[tuple[Any, Room]], x: Tensor, angles: Any) -> list[Tensor]:
    """The results of the layers, one after the other, in one call."""
    with torch.inference_mode(False):  # whose tensors count their changes
        y = torch.empty((len(ready), *x.shape), dtype=x.dtype)
        results = list(y.unbind())
    held = [room for _, room in rooms]
    cos, sin = (angle.data_ptr() for angle in angles) if angles else (0, 0)
    keys, values = zip(*(room.addresses for room in held), strict=True)
    _C.run_layers(
        ready,
        x.data_ptr(),
        cos,
        sin,
        y.data_ptr(),
        keys,
        values,
        [room.known for room in held],
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
    state = module.__dict__.get(proofs.STATE)
    if state is None:
        state = module.__dict__[proofs.STATE] = State()
    return state


def _ready(
    module: Any, settings: Settings, x: Tensor, angles: Any, cache: Any
) -> tuple[_C.DecoderLayer, Any, Room] | None:
    """(the call, the cache's layer, its room) where this layer can decode x now, else None."""
    state = _state(module)
    ready = state.prepared
    if ready is None or not ready.holds or ready.dtype != x.dtype:
        ready = state.prepared = prepare(module, settings, x.dtype)
    if ready.call is None or any(ready.hooks) or x.shape[-1] != ready.columns:
        return None
    if ready.experts is not None and not mixture.plain(ready.experts):
        return None
    attention = ready.attention
    if module.training or attention.training or any(part.training for part in ready.training):
        return None
    implementation = attention.config._attn_implementation
    if implementation != "eager" and (implementation != "sdpa" or settings.softcap):
        return None
    for angle in angles or ():
        if angle.shape != (1, 1, settings.turning) or angle.dtype != x.dtype or not angle.is_contiguous():
            return None
    layer = appendable(cache, attention.layer_idx, ready.key_heads, ready.width, x.dtype)
    return None if layer is None else (ready.call, layer, room_for_one(layer))
