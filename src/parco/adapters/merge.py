"""Adapters become part of the matrices beside which they stand: added in, or kept as a term of a stored weight."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from parco.adapters import adapted
from parco.adapters.layers import Adapter, LowRank, Narrow, VectorBased, WeightDecomposed, Whole, matrix, put_
from parco.formats import DTYPE_NAMES
from parco.nn import StoredWeight, tied
from parco.nn.linear import Linear
from parco.nn.parts import rows as dense_rows
from parco.weights import Dense, Sum
from parco.weights import LowRank as LowRankWeight
from parco.weights.sparse import Sparse


@dataclass(frozen=True)
class Merged:
    """What `merge_` did: the layers, and of those that were stored in few bits and rounded anew, (the error of the new
    matrix as a share of its norm, the same as a share of the norm of what was to be added).
    """

    name: str
    layers: tuple[str, ...]
    losses: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])

    def __str__(self) -> str:
        lines = [f"{len(self.layers)} layers have {self.name!r} in their matrices"]
        lines += [
            f"{name}: rounding anew lost {whole:.2%} of the matrix, {update:.1%} of the update"
            for name, (whole, update) in self.losses.items()
        ]
        return "\n".join(lines)


@torch.no_grad()
def merge_(model: nn.Module, name: str = "default", *, requantize: bool = False, reversible: bool = False) -> Merged:
    """Adds the adapter `name` to the matrices of its layers, in place: W + s·B·A is computed in fp32 and rounded to W's
    dtype. The adapter is gone then, and the layers are what they were before it, but that what it froze stays
    frozen. With `reversible` it stays beside its layers, not active, as do the former matrices, so that `unmerge_`
    brings back their very bits.

    A weight stored in few bits would lose part of the sum: with `requantize` it is rounded to nearest in its format and
    the loss is reported; `to_sum_` keeps all of it.

    Raises ValueError, before anything is changed: where no such adapter is; for a stored weight without `requantize`,
    one made of parts, or one with zeros that are not stored; for a matrix that another module shares; for bottleneck
    adapters, which are no matrix.
    """
    adapters = _adapters(model, name, reversible)
    for path, (module, adapter) in adapters.items():
        _check(model, path, module, adapter, requantize)
    losses: dict[str, tuple[float, float]] = {}
    for path, (module, adapter) in adapters.items():
        former = copy.deepcopy(_tensors(module, adapter)) if reversible else None
        loss = _add_(module, adapter)
        if loss is not None:
            losses[path] = loss
        adapted.deactivate(module, name)
        if former is None:
            adapted.detach(module, name)
        else:
            module._merged += ((name, former),)
    return Merged(name, tuple(adapters), losses)


@torch.no_grad()
def unmerge_(model: nn.Module, name: str = "default") -> None:
    """Brings back the matrices, bit by bit, that `merge_(..., reversible=True)` added the adapter `name` to; it is
    active again, beside those that are. Raises ValueError, before anything is changed, where it was not merged so, or
    another one after it, or where it cannot be active beside one that is (DoRA): `set_(model, None)` first.
    """
    modules = [module for _, module in adapted.adapted(model) if name in adapted.merged(module)]
    if not modules:
        raise ValueError(f"{name!r} is not merged, or for good: merge_(..., reversible=True) keeps what unmerge_ needs")
    for module in modules:
        if module._merged[-1][0] != name:
            raise ValueError(f"{module._merged[-1][0]!r} was merged after {name!r}: unmerge it first")
    chosen = adapted.shares_of(model, {**adapted.active(model), name: 1.0}, out=name)
    for module in modules:
        *module._merged, (_, former) = module._merged
        module._merged = tuple(module._merged)
        if isinstance(former, StoredWeight):
            module.weight = former
        else:
            for own, each in zip(_tensors(module, module.adapters[name]), former, strict=True):
                own.copy_(each)
    for module, own in chosen:
        module._active = own


@torch.no_grad()
def to_sum_(model: nn.Module, name: str = "default", dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """Makes the adapter `name` a term of the stored weights beside which it stands, in place: `sum(base,
    lowrank(dense, dense))` with factors in `dtype`, which is multiplied by in one call and saved with the model. The
    adapter is gone then. Returns the layers' names.

    Raises ValueError, before anything is changed, where no such adapter is, a layer's weight is not stored (`merge_` is
    exact there), or the adapter is no product of two factors (LoRA and VeRA are).
    """
    chosen: dict[str, tuple[Any, LowRank | VectorBased]] = {}
    for path, (module, adapter) in _adapters(model, name, False).items():
        _check_whose(model, path)
        if not isinstance(module, Linear):
            raise ValueError(f"to_sum_: the weight of {path} is not a stored one; merge_ adds to it exactly")
        if isinstance(adapter, WeightDecomposed) or not isinstance(adapter, LowRank | VectorBased):
            raise ValueError(f"to_sum_: {adapter.method} beside {path} is no product of two factors")
        chosen[path] = module, adapter
    for module, adapter in chosen.values():
        left, right = adapter.factors(module)
        term = LowRankWeight(*(Dense((each.shape[0], each.shape[1]), DTYPE_NAMES[dtype]) for each in (left, right)))
        stored: StoredWeight = module.weight
        terms = stored.spec.terms if isinstance(stored.spec, Sum) else (stored.spec,)
        tensors = (*stored.spec.unpack(*stored.tensors()), left.to(dtype), right.to(dtype))
        put_(module, StoredWeight(Sum(*terms, term), tensors, stored.dtype))
        adapted.detach(module, name)
    return tuple(chosen)


def _adapters(model: nn.Module, name: str, reversible: bool) -> dict[str, tuple[Any, Adapter]]:
    """{layer's name: (layer, adapter)}. Raises ValueError where there are none, they are merged already, or what is to
    stay lies over what can be taken out again.
    """
    adapted.check_name(model, name)
    found: dict[str, tuple[Any, Adapter]] = {}
    for path, module in adapted.adapted(model):
        if name in adapted.merged(module):
            raise ValueError(f"{name!r} is merged already")
        if name in module.adapters:
            if module._merged and not reversible:
                raise ValueError(
                    f"{module._merged[-1][0]!r} is merged into {path} reversibly, and taking it out would lose "
                    f"{name!r}: unmerge_ it, or merge with reversible=True"
                )
            found[path] = module, module.adapters[name]
    return found


def _check_whose(model: nn.Module, path: str) -> None:
    """Raises ValueError where another module computes with the matrix too."""
    shared = [each for each in tied(model, path) if each != path]
    if shared:
        raise ValueError(f"{path} shares its matrix with {shared[0]}, which would change too; save the adapter instead")


def _check(model: nn.Module, path: str, module: Any, adapter: Adapter, requantize: bool) -> None:
    _check_whose(model, path)
    if isinstance(adapter, Narrow):
        raise ValueError(f"{adapter.method} beside {path} is a network of its own: no matrix holds it")
    if isinstance(adapter, Whole) or not isinstance(module, Linear) or isinstance(module.weight.spec, Dense):
        return
    if module.weight.spec.parts():
        raise ValueError(
            f"{path} is stored as {module.weight.spec}, which no rounding makes: to_sum_ adds a term to it"
        )
    if isinstance(module.weight.spec, Sparse):
        raise ValueError(
            f"{path} is stored as {module.weight.spec}, whose zeros have no place for a sum: to_sum_ adds a term to it"
        )
    if not requantize:
        raise ValueError(
            f"{path} is stored as {module.weight.spec}, and adding to it rounds it anew: ask for that with "
            "requantize=True, or keep base and factors apart with to_sum_"
        )


def _tensors(module: Any, adapter: Adapter) -> Any:
    """What adding the adapter overwrites: a stored weight, or tensors."""
    if isinstance(adapter, Whole):
        return [module.state_dict(keep_vars=True)[name].data for name in adapter.module.state_dict()]
    return module.weight if isinstance(module, Linear) else [module.weight.data]


def _add_(module: Any, adapter: Adapter) -> tuple[float, float] | None:
    """Adds the adapter to the module's own numbers; returns what rounding anew lost, where it did."""
    if isinstance(adapter, Whole):
        for own, each in zip(_tensors(module, adapter), adapter.module.state_dict().values(), strict=True):
            own.copy_(each)
        return None
    merged = adapter.merged(module)
    if not isinstance(module, Linear):
        dense_rows(module).copy_(merged)
        return None
    spec, before = module.weight.spec, matrix(module)
    put_(module, StoredWeight(spec, spec.encode(merged), module.weight.dtype))
    if isinstance(spec, Dense):
        return None
    lost, update = (matrix(module) - merged).norm().item(), (merged - before).norm().item()
    return lost / max(merged.norm().item(), 1e-30), lost / max(update, 1e-30)
