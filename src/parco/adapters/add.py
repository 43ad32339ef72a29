"""Puts adapters into a model and takes them out again."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from parco.adapters import adapted, start
from parco.adapters.layers import Adapter, Projections, WeightDecomposed, Whole, make, of_layer
from parco.adapters.methods import Factors, Method, VeRA, parse
from parco.adapters.targets import Targets, by_pattern, check_patterns, chosen, modules_named
from parco.nn import StoredWeight
from parco.nn.parts import shape
from parco.nn.saved import numbers


@dataclass(frozen=True)
class Added:
    """What `add_` did: the method of each layer that got an adapter, the modules copied whole, how many numbers train
    and how many there are in all (of a stored matrix as many as it stands for), and why other linear layers were left,
    by name.
    """

    name: str
    methods: dict[str, Method]
    copies: tuple[str, ...]
    trained: int
    total: int
    left: dict[str, str]

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for method in self.methods.values():
            counts[str(method)] = counts.get(str(method), 0) + 1
        lines = [f"{count:>4} layers: {method}" for method, count in counts.items()]
        lines += [f"copied {name}" for name in self.copies]
        lines.append(f"{self.trained:,} of {self.total:,} parameters train ({self.trained / self.total:.2%})")
        return "\n".join(lines + [f"left {name}: {reason}" for name, reason in self.left.items()])


def add_(
    model: nn.Module,
    method: Method | str,
    targets: Targets = None,
    name: str = "default",
    *,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: Sequence[str] | None = None,
    inputs: Iterable[Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Added:
    """Gives linear layers of `model` an adapter, in place: `nn.Linear`, Transformers' Conv1D, parco's Linear over any
    stored weight, and layers that follow a recipe. The adapter is active and trains; all else is frozen.

    `method` is a method or its text ("lora(16, alpha=32)"). `targets` says which layers: None for every linear of the
    repeated blocks, "all-linear" for every linear but the head, a sequence of names or of their last parts, or a
    regular expression. `rank_pattern` and `alpha_pattern` give layers whose names they match a rank or an alpha of
    their own; `modules_to_save` names modules that the adapter has a trained copy of. `inputs`, batches that the model
    takes (tensors of tokens, or mappings of arguments), are what `init="eva"` learns the layers' inputs from. `dtype`
    is that of the parameters; products are computed in that of the layer's input.

    Raises ValueError for names that match nothing, a rank above a matrix's smaller side, or an adapter `name` that is
    taken; TypeError where `model` is no module. Then nothing is changed.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_name(model, name)
    method = parse(method)
    layers, left = chosen(model, targets, method)
    ranks, alphas = rank_pattern or {}, alpha_pattern or {}
    check_patterns(ranks, layers, "rank_pattern")
    check_patterns(alphas, layers, "alpha_pattern")
    methods = {path: of_layer(method, by_pattern(ranks, path), by_pattern(alphas, path)) for path in layers}
    modules = dict(model.named_modules())
    for path, own in methods.items():
        check_size(own, path, modules[path])
    copies = modules_named(model, modules_to_save or (), "modules_to_save")
    check_copies(modules, copies, layers)
    begin = start.prepare(model, methods, inputs)
    shared = projections(method, [modules[path] for path in layers]) if isinstance(method, VeRA) else None
    made: dict[str, Adapter] = {}
    for path, own in methods.items():
        made[path] = adapter = make(own, modules[path], dtype, shared)
        begin(path, modules[path], adapter)
        if isinstance(adapter, WeightDecomposed):
            adapter.reset_magnitude(modules[path])
    made |= {path: Whole(copy.deepcopy(modules[path])) for path in copies}
    install(model, name, made, True)
    return added(model, name, methods, copies, left)


def install(model: nn.Module, name: str, adapters: Mapping[str, Adapter], trains: bool) -> None:
    """Puts adapters beside their layers and makes them the active ones. Where they train, nothing else does."""
    if trains:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    for path, adapter in adapters.items():
        adapted.attach(model.get_submodule(path), name, adapter.requires_grad_(trains))
    adapted.set_(model, name)


def added(
    model: nn.Module, name: str, methods: Mapping[str, Method], copies: Iterable[str], left: Mapping[str, str]
) -> Added:
    """What was put into `model`."""
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    return Added(name, dict(methods), tuple(copies), trained, numbers(model), dict(left))


def check_copies(modules: Mapping[str, nn.Module], copies: Sequence[str], layers: Sequence[str]) -> None:
    """Raises ValueError unless each of these modules can be copied and trained, and none lies in another."""
    for path in copies:
        module = modules[path]
        if path in layers:
            raise ValueError(f"modules_to_save: {path!r} is a target of the adapter too")
        if isinstance(module, adapted.Adapted) or any(isinstance(each, adapted.Adapted) for each in module.modules()):
            raise ValueError(f"modules_to_save: {path!r} carries an adapter already")
        within = [each for each in (*layers, *copies) if each.startswith(f"{path}.")]
        if within:
            raise ValueError(f"modules_to_save: {path!r} holds {within[0]!r}, which gets an adapter of its own")
        if any(isinstance(each, StoredWeight) for each in module.modules()):
            raise ValueError(f"modules_to_save: {path!r} holds a stored weight, which does not train")


def remove_(model: nn.Module, name: str) -> None:
    """Takes the adapter `name` out; layers that carry no other have the class and the names that they had before. What
    `add_` froze stays frozen, and the matrices that `pissa` and `loftq` changed stay changed. Raises ValueError where
    there is none of that name, or it is merged.
    """
    adapted.check_name(model, name)
    if any(name in adapted.merged(module) for _, module in adapted.adapted(model)):
        raise ValueError(f"{name!r} is merged: unmerge_ it first")
    for _, module in list(adapted.adapted(model)):
        if name in module.adapters:
            adapted.detach(module, name)


def projections(method: VeRA, layers: Sequence[Any]) -> Projections:
    """VeRA's A [r, largest K] and B [largest N, r], each uniform in ±√(6/columns) (Kaiming), from the method's seed:
    the numbers that PEFT draws for the same layers.
    """
    shapes = [shape(layer) for layer in layers]
    rows, columns = max(rows for rows, _ in shapes), max(columns for _, columns in shapes)
    generator = torch.Generator().manual_seed(method.seed)
    a, b = torch.empty(method.rank, columns), torch.empty(rows, method.rank)
    for factor in (a, b):
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(factor.shape[1]))
        factor.uniform_(-bound, bound, generator=generator)
    return Projections(a, b).on(layers[0].weight.device)


def check_size(method: Method, path: str, layer: Any) -> None:
    """Raises ValueError where a rank is above the smaller side of the layer's matrix. VeRA's may be: its factors are
    no product of the matrix's own."""
    rows, columns = shape(layer)
    if isinstance(method, Factors) and method.rank > min(rows, columns):
        raise ValueError(
            f"rank {method.rank} is above the smaller side of {path}, which is {rows}x{columns}: at most "
            f"{min(rows, columns)}"
        )


def check_name(model: nn.Module, name: str) -> None:
    """Raises ValueError unless a new adapter of `model` may have this name."""
    if not name or "." in name or name == adapted.BASE or hasattr(nn.ModuleDict, name):
        raise ValueError(f"name={name!r} cannot be an adapter's: give a plain word, without dots")
    if name in adapted.names(model):
        raise ValueError(f"name={name!r} is taken: the model carries such an adapter; remove_ it, or give another")
