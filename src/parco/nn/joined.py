"""Matrices that read the same input, side by side in memory, so that one product gives the results of all.

Where q, k and v, or gate and up, are stored in one format and one layout, their tensors are put one after the other in
memory, and each module keeps its part as a view. What belongs together is thus seen from the addresses alone: nothing
else has to be kept, and whatever gives a module other tensors (a move, another layout, a loaded state) only takes the
parts apart again, which costs speed and nothing else. Of layers that hold one right factor together, the left ones are
put side by side: the whole is their product with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parco.kernels.linear.panels import PANEL_ROWS, is_packed
from parco.nn.linear import Linear
from parco.nn.stored import StoredWeight
from parco.weights import Dense, LowRank, Quantized, Shared, Weight

Spec = Dense | Quantized


def join_(layers: Sequence[nn.Module]) -> bool:
    """Moves the tensors of `layers` side by side, in place, where they can be multiplied as one. Returns whether they
    now are.
    """
    if joined(layers) is not None:
        return True
    if not all(isinstance(layer, Linear) for layer in layers) or not _alike(layers):
        return False
    for parts in zip(*(_tensors(layer) for layer in layers), strict=True):
        whole = torch.cat([part.detach() for part in parts])
        start = 0
        for part in parts:
            stop = start + part.shape[0]
            part.data = whole[start:stop]
            start = stop
    return True


def joined(layers: Sequence[nn.Module]) -> tuple[Weight, tuple[Tensor, ...], Tensor | None] | None:
    """The spec, the tensors and the bias of the matrix whose rows are those of all `layers`, or None unless they lie
    side by side. No copies.
    """
    if not all(isinstance(layer, Linear) for layer in layers):
        return None
    found: list[Tensor] = []
    columns = [_tensors(layer) for layer in layers]
    if len({len(column) for column in columns}) != 1:
        return None
    for parts in zip(*columns, strict=True):
        if not _adjacent(parts):
            return None
        first = parts[0]
        rows = sum(part.shape[0] for part in parts)
        found.append(first.detach().as_strided((rows, *first.shape[1:]), first.stride()))
    spec, basis = _whole(layers), _basis(layers)
    if spec is None:
        return None
    bias = found.pop() if _bias(layers[0]) is not None else None
    if basis is None:
        return spec, tuple(found), bias
    return LowRank(spec, basis.spec), (*found, *basis.tensors()), bias


def _bias(layer: Any) -> Tensor | None:
    return layer.bias


def _tensors(layer: nn.Module) -> list[Tensor]:
    """Of a Linear: those of its own rows, then its bias."""
    bias = _bias(layer)
    return [*_rows(layer).tensors(), *([] if bias is None else [bias])]


def _rows(layer: Any) -> StoredWeight:
    """The matrix whose rows are the layer's own: its weight, or the left factor where the right one is shared."""
    weight = layer.weight
    return weight.left if _has_basis(weight.spec) else weight


def _has_basis(spec: Weight) -> bool:
    return isinstance(spec, LowRank) and isinstance(spec.right, Shared)


def _basis(layers: Sequence[Any]) -> StoredWeight | None:
    """The right factor that all layers hold together."""
    held = [layer.weight.right if _has_basis(layer.weight.spec) else None for layer in layers]
    return held[0] if all(each is held[0] for each in held) else None


def _adjacent(parts: Sequence[Tensor]) -> bool:
    first = parts[0]
    storage = first.untyped_storage().data_ptr()
    for left, right in itertools.pairwise(parts):
        if (
            right.data_ptr() != left.data_ptr() + left.nbytes
            or right.untyped_storage().data_ptr() != storage
            or right.shape[1:] != left.shape[1:]
            or right.dtype != left.dtype
            or not (left.is_contiguous() and right.is_contiguous())
        ):
            return False
    return first.is_cpu


def _alike(layers: Sequence[nn.Module]) -> bool:
    """Whether the tensors of `layers` may be put together: plain ones on the CPU, of the shapes that one matrix has."""
    if _whole(layers) is None:
        return False
    columns = [_tensors(layer) for layer in layers]
    if len({len(column) for column in columns}) != 1:
        return False
    plain = all(
        type(tensor) is nn.Parameter and tensor.is_cpu and not tensor.is_shared() and tensor.is_contiguous()
        for column in columns
        for tensor in column
    )
    same = all(len({(part.dtype, part.shape[1:]) for part in parts}) == 1 for parts in zip(*columns, strict=True))
    owners = {id(tensor) for column in columns for tensor in column}
    return plain and same and len(owners) == sum(map(len, columns))


def _whole(layers: Sequence[Any]) -> Spec | None:
    """The spec of the rows of all, where the tensors of each, one after the other, are its tensors."""
    specs: list[Spec] = []
    layouts: set[bool] = set()
    if _basis(layers) is None and any(_has_basis(layer.weight.spec) for layer in layers):
        return None
    for layer in layers:
        own = _rows(layer)
        if not isinstance(own.spec, Spec):
            return None
        specs.append(own.spec)
        layouts.add(is_packed(own.tensors()[0]))
    kinds = {(type(spec), spec.format, spec.shape[1]) for spec in specs}
    products = {layer.weight.product for layer in layers}
    if max(len(kinds), len(layouts), len(products)) != 1 or len({_bias(layer) is None for layer in layers}) != 1:
        return None
    first = specs[0]
    rows = [spec.shape[0] for spec in specs]
    unit = max(PANEL_ROWS if layouts.pop() else 1, first.format.block.rows or 0)
    if any(count % unit for count in rows[:-1]):
        return None
    shape = (sum(rows), first.shape[1])
    whole = Dense(shape, first.format) if isinstance(first, Dense) else Quantized(first.format, shape)
    for name, tensor in whole.tensors().items():
        parts = [spec.tensors()[name].shape for spec in specs]
        if not tensor.shape or sum(part[0] if part else 0 for part in parts) != tensor.shape[0]:
            return None
    return whole
