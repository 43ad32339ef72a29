"""Puts a recipe into a model: its linear layers keep their class's name, parameters and place, and multiply otherwise.

A converted layer gets a subclass of its own class, so optimizers, checkpoints, tied weights, FSDP2, DDP and whoever
looks for `nn.Linear` find what they found before. `state_dict` changes for recipes with delayed scales only, whose
histories are buffers of the layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from parco.kernels.cast import DelayedScaling
from parco.nn import blocks, groups, linears
from parco.nn.linear import Linear as StoredLinear
from parco.nn.linear import carries_adapters, kind_of, under_its_name
from parco.training.products import linear
from parco.training.readings import Probe
from parco.training.recipe import BF16, ROLES, Recipe


@dataclass(frozen=True)
class Prepared:
    """What `prepare_` did: the recipe of each converted layer, and why others were left as they are, by name."""

    recipes: dict[str, Recipe]
    left: dict[str, str]

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for recipe in self.recipes.values():
            counts[str(recipe)] = counts.get(str(recipe), 0) + 1
        lines = [f"{count:>4} layers: {recipe}" for recipe, count in counts.items()]
        return "\n".join(lines + [f"left {name}: {reason}" for name, reason in self.left.items()])


def prepare_(
    model: torch.nn.Module,
    recipe: Recipe | str | Mapping[str, Recipe | str],
    filter_fn: Callable[[torch.nn.Module, str], bool] | None = None,
) -> Prepared:
    """Makes the linear layers of `model` (`nn.Linear`, GPT-2's Conv1D) compute their three products by `recipe`, a
    Recipe or its text, in place.

    A mapping gives recipes to the layers whose names match its patterns, those of shells (`{"*.mlp.*": "mxfp8", "*":
    "bf16"}`); the first that matches counts, and layers that none matches are left. A layer that a key names in full
    gets this very recipe, whether or not it is a head, a router or in a block at the ends: so `recipes_of` restores.

    `filter_fn(module, name)` says which layers take part; those of which it says no stay as they are. Without it the
    output head takes part in dense recipes (bf16, fp16) only and is bf16 otherwise, and routers stay as they are. The
    blocks at the ends that the recipe leaves out (`Recipe.ends`) are bf16. A model can be prepared again, with another
    recipe. Embeddings, norms and attention are not touched; gradients of stored weights (`parco.nn.Linear`), which do
    not train, neither.

    Raises ValueError for an unknown recipe, where no layer takes part and for a pattern that matches no layer,
    TypeError where `model` is no module.
    """
    if not isinstance(model, torch.nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    patterns = {"*": recipe} if isinstance(recipe, Recipe | str) else recipe
    given = {pattern: Recipe.parse(each) for pattern, each in patterns.items()}
    chosen: dict[str, tuple[torch.nn.Module, bool, Recipe]] = {}
    left: dict[str, str] = {}
    repeated = [f"{name}." for name, _ in blocks(model)]
    ends = {each: _ends(repeated, each) for each in given.values()}
    kinds = {name: group.kind for group in groups(model) for name in group.members}
    if any(each.ends for each in ends) and not repeated:
        left["ends"] = "no repeated blocks are found, so none at the ends stays in bf16"
    found = linears(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name not in found:
            left[name] = "its class has a forward of its own, or is used by one that passes it by"
    _check_patterns(given, {*found, *left})
    for name, site in found.items():
        module = site.module
        pattern = name if name in given else next((each for each in given if fnmatchcase(name, each)), None)
        if "forward" in module.__dict__:
            left[name] = "its forward has been replaced"
        elif site.kind == "expert" or isinstance(module, StoredLinear):
            left[name] = "experts in one tensor are not converted" if site.kind == "expert" else "a stored weight"
        elif carries_adapters(module) and "_recipe" not in module.__dict__:
            left[name] = "it carries adapters, which are put over a recipe"
        elif filter_fn is not None and not filter_fn(module, name):
            left[name] = "filter_fn says no"
        elif pattern is None:
            left[name] = f"matches none of {', '.join(given)}"
        elif filter_fn is None and kinds.get(name) == "router" and pattern != name:
            left[name] = "it decides which expert runs"
        else:
            own = given[pattern]
            high = (kinds.get(name) in ("head", "embed") and filter_fn is None) or name.startswith(ends[own])
            chosen[name] = module, site.kind == "conv1d", BF16 if high and not own.is_dense and pattern != name else own
    if not chosen:
        raise ValueError(f"prepare_: {type(model).__name__} has no linear layer that takes part")
    for module, turned, own in chosen.values():
        if not carries_adapters(module):  # a layer with adapters computes with a converted one already
            module.__class__ = _class_of(kind_of(module), turned)
        follow(module, own)
    return Prepared({name: own for name, (_, _, own) in chosen.items()}, left)


def _check_patterns(given: Mapping[str, Recipe], names: set[str]) -> None:
    """ValueError unless every pattern matches one of the layers' names."""
    if len(given) == 1 and "*" in given:
        return  # a model without layers is told so in other words
    for pattern in given:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"pattern {pattern!r} matches no linear layer: there are {', '.join(sorted(names)[:4]) or 'none'}, …"
            )


def _ends(names: list[str], recipe: Recipe) -> tuple[str, ...]:
    """Those of the repeated blocks that stay in bf16."""
    count = math.ceil(recipe.ends * len(names) - 1e-9)
    first = count // 4
    return tuple(names[:first] + names[len(names) - (count - first) :]) if count else ()


def recipes_of(model: torch.nn.Module) -> dict[str, str]:
    """The text of the recipe of each prepared layer, by its name: what `prepare_` takes to make another model follow
    the same, to be kept in a checkpoint beside the state dict.
    """
    return {name: str(module._recipe) for name, module in model.named_modules() if "_recipe" in module.__dict__}


def follow(module: Any, recipe: Recipe, *, keeps_scales: bool = False) -> None:
    """Has a converted layer multiply by `recipe`. Delayed scales start anew; with `keeps_scales` those of operands that
    go on in the same format stay.
    """
    before: Recipe | None = module.__dict__.get("_recipe") if keeps_scales else None
    kept = {role for role in ROLES if before and before.delayed_format(role) == recipe.delayed_format(role)}
    module._recipe = recipe
    module.__dict__.setdefault("_probe", Probe())
    for role in ROLES:
        if role not in kept:
            for part in DelayedScaling._fields:
                module._buffers.pop(f"{role}_{part}", None)
    for role in recipe.delayed:
        if role not in kept:
            for part, tensor in DelayedScaling.start(device=module.weight.device)._asdict().items():
                module.register_buffer(f"{role}_{part}", tensor)


def _kept_in_fp32(module: Any, before: dict[str, Tensor]) -> None:
    """After the tensors of a module were moved: scales are as they were, on the device of the new ones, whatever dtype
    the model got; where they come from the meta device they start anew.
    """
    for name, old in before.items():
        new: Tensor = module._buffers[name]
        if old.is_meta and not new.is_meta:
            module._buffers[name] = getattr(DelayedScaling.start(old.numel(), new.device), name.rpartition("_")[2])
        elif new.dtype != torch.float32:
            module._buffers[name] = new.to(torch.float32) if new.is_meta else old.to(new.device)


@functools.cache
def _class_of(original: type[torch.nn.Module], turned: bool) -> type[torch.nn.Module]:
    """The subclass of `original` that multiplies by its recipe; its weight is [K, N] where it is `turned`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        recipe: Recipe = self._recipe
        scales = None
        if recipe.delayed:
            scales = {
                role: DelayedScaling(*(self._buffers[f"{role}_{part}"] for part in DelayedScaling._fields))
                for role in recipe.delayed
            }
        weight = self.weight.T if turned else self.weight
        return linear(x, weight, self.bias, recipe, scales, self.training, self._probe)

    def moved(self: Any, *arguments: Any, **named: Any) -> Any:
        names = (f"{role}_{part}" for role in self._recipe.delayed for part in DelayedScaling._fields)
        before = {name: self._buffers[name] for name in names}
        original._apply(self, *arguments, **named)  # pyright: ignore[reportPrivateUsage]
        _kept_in_fp32(self, before)
        return self

    def extra_repr(self: Any) -> str:
        return ", ".join(filter(None, (original.extra_repr(self), f"recipe={self._recipe}")))

    def reduce(self: Any, protocol: int) -> Any:
        return _revived, (original, turned), self.__dict__

    members: dict[str, object] = {"__reduce_ex__": reduce, "extra_repr": extra_repr, "forward": forward}
    return under_its_name(original, (original,), members | {"_apply": moved})


def _revived(original: type[torch.nn.Module], turned: bool) -> torch.nn.Module:
    """An empty converted layer, which unpickling and copying fill."""
    kind: Any = _class_of(original, turned)
    return kind.__new__(kind)


def delayed_scales(model: torch.nn.Module) -> list[Tensor]:
    """The scales and histories of all layers of `model` whose recipe delays them. The greatest over all ranks of each
    is what one rank would have found in all ranks' tokens.
    """
    return [
        module.get_buffer(f"{role}_{part}")
        for module in model.modules()
        for role in getattr(module, "_recipe", BF16).delayed
        for part in DelayedScaling._fields
    ]
