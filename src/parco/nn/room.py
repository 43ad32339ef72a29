"""Room behind the keys and values of a Transformers cache, so that a decoding step writes its own and copies none.

A `DynamicLayer` holds one tensor of keys and one of values, and appends by `torch.cat`, which copies all tokens for
every token. Here they become views of tensors that are twice as long: the layer's attributes remain what they were,
only appending is done behind the view's end. Whatever else gives the layer other tensors (crop, reorder, reset, a plain
update) takes the room away, and the next step makes another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEAST = 64
"""Tokens for which there is room at first."""


@dataclass
class Room:
    """Tensors [batch, heads, capacity, D], of which the tokens from `start` to `used` are the cache's; `views` are what
    its layer was given, and `ahead` says who wrote behind them last.
    """

    keys: Tensor
    values: Tensor
    start: int
    used: int
    views: tuple[Tensor, Tensor]
    ahead: object = None

    @property
    def known(self) -> int:
        """Tokens of the cache."""
        return self.used - self.start

    @property
    def addresses(self) -> tuple[int, int]:
        """Where the first of them begins, for keys and for values."""
        keys, values = (x.data_ptr() + self.start * x.stride(2) * x.element_size() for x in (self.keys, self.values))
        return keys, values


def room_for_one(layer: Any) -> Room:
    """The room of `layer`, a cache's layer that is initialized, with at least one place behind its tokens."""
    room: Room | None = layer.__dict__.get("_parco_room")
    known = layer.keys.shape[2]
    if (
        room is None
        or layer.keys is not room.views[0]
        or layer.values is not room.views[1]
        or room.known != known  # a copy of the layer that shares the room has gone on
        or room.used == room.keys.shape[2]
    ):
        keys, values = (_longer(x, max(LEAST, 2 * known)) for x in (layer.keys, layer.values))
        room = Room(keys, values, 0, known, (layer.keys, layer.values))
        layer._parco_room = room
    return room


def written(layer: Any, room: Room) -> None:
    """Makes the token behind the last part of the layer."""
    room.used += 1
    room.ahead = None
    if layer.is_sliding:  # whose cache ends one token before the window does
        layer.cumulative_length += 1
        room.start = max(room.start, room.used - layer.sliding_window + 1)
    room.views = (room.keys[:, :, room.start : room.used], room.values[:, :, room.start : room.used])
    layer.keys, layer.values = room.views


def _longer(x: Tensor, capacity: int) -> Tensor:
    made = x.new_empty((x.shape[0], x.shape[1], capacity, x.shape[3]))
    made[:, :, : x.shape[2]] = x
    return made


def appendable(cache: Any, index: int, heads: int, columns: int, dtype: torch.dtype) -> Any:
    """The layer `index` of a Transformers cache where a step of one sequence may write into it, else None: one that
    appends, and drops nothing but what leaves its window, with keys and values of this kind on the CPU.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    if type(cache) is not DynamicCache or cache.offloading or index >= len(cache.layers):
        return None
    layer: Any = cache.layers[index]
    kind: type = type(layer)
    keys, values = layer.keys, layer.values
    if not layer.is_initialized or keys is None or type(keys) is not Tensor or type(values) is not Tensor:
        return None
    if kind is DynamicSlidingWindowLayer:
        kept = min(layer.cumulative_length, layer.sliding_window - 1)
        if layer.record_past or keys.shape[-2] != kept:
            return None
    elif kind is not DynamicLayer:
        return None
    shape = keys.shape
    plain = len(shape) == 4 and shape[0] == 1 and shape[1] == heads and shape[2] > 0 and shape[3] == columns
    if not plain or values.shape != shape or not keys.is_cpu or keys.dtype != dtype or values.dtype != dtype:
        return None
    return layer
