"""Puts a recipe into a model: its linear layers keep their class's name, parameters and place, and multiply otherwise.

A converted layer gets a subclass of its own class, so optimizers, checkpoints, tied weights, FSDP2, DDP and whoever
looks for `nn.Linear` find what they found before. `state_dict` changes for recipes with delayed scales only, whose
histories are buffers of the layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parco.kernels.cast import DelayedScaling
from parco.nn import blocks, groups, linears
from parco.nn.linear import Linear as StoredLinear
from parco.nn.linear import kind_of, under_its_name
from parco.training.products import linear
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
    model: torch.nn.Module, recipe: Recipe | str, filter_fn: Callable[[torch.nn.Module, str], bool] | None = None
) -> Prepared:
    """Makes the linear layers of `model` (`nn.Linear`, GPT-2's Conv1D) compute their three products by `recipe`, a
    Recipe or its text, in place.

    `filter_fn(module, name)` says which layers take part; those of which it says no stay as they are. Without it the
    output head takes part in dense recipes (bf16, fp16) only and is bf16 otherwise, and routers stay as they are. The
    blocks at the ends that the recipe leaves out (`Recipe.ends`) are bf16. A model can be prepared again, with another
    recipe. Embeddings, norms and attention are not touched; gradients of stored weights (`parco.nn.Linear`), which do
    not train, neither.

    Raises ValueError for an unknown recipe and where no layer takes part, TypeError where `model` is no module.
    """
    if not isinstance(model, torch.nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    recipe = Recipe.parse(recipe)
    chosen: dict[str, tuple[torch.nn.Module, bool, Recipe]] = {}
    left: dict[str, str] = {}
    repeated = [f"{name}." for name, _ in blocks(model)]
    ends = _ends(repeated, recipe)
    kinds = {name: group.kind for group in groups(model) for name in group.members}
    if recipe.ends and not repeated:
        left["ends"] = "no repeated blocks are found, so none at the ends stays in bf16"
    found = linears(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name not in found:
            left[name] = "its class has a forward of its own, or is used by one that passes it by"
    for name, site in found.items():
        module = site.module
        if "forward" in module.__dict__:
            left[name] = "its forward has been replaced"
        elif site.kind == "expert" or isinstance(module, StoredLinear):
            left[name] = "experts in one tensor are not converted" if site.kind == "expert" else "a stored weight"
        elif filter_fn is not None and not filter_fn(module, name):
            left[name] = "filter_fn says no"
        elif filter_fn is None and kinds.get(name) == "router":
            left[name] = "it decides which expert runs"
        else:
            head = kinds.get(name) in ("head", "embed") and filter_fn is None
            low = not (head or name.startswith(ends)) or recipe.is_dense
            chosen[name] = module, site.kind == "conv1d", recipe if low else BF16
    if not chosen:
        raise ValueError(f"prepare_: {type(model).__name__} has no linear layer that takes part")
    for module, turned, own in chosen.values():
        _convert(module, turned, own)
    return Prepared({name: own for name, (_, _, own) in chosen.items()}, left)


def _ends(names: list[str], recipe: Recipe) -> tuple[str, ...]:
    """Those of the repeated blocks that stay in bf16."""
    count = math.ceil(recipe.ends * len(names) - 1e-9)
    first = count // 4
    return tuple(names[:first] + names[len(names) - (count - first) :]) if count else ()


def _convert(module: Any, turned: bool, recipe: Recipe) -> None:
    module.__class__ = _class_of(kind_of(module), turned)
    module._recipe = recipe
    for role in ROLES:
        for part in DelayedScaling._fields:
            module._buffers.pop(f"{role}_{part}", None)
    for role in recipe.delayed:
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
        return linear(x, weight, self.bias, recipe, scales, self.training)

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
