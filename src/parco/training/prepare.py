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

from parco.formats import ScaleDelayed
from parco.kernels.cast import DelayedScaling
from parco.nn import blocks, groups, linears
from parco.nn.linear import Linear as StoredLinear
from parco.nn.linear import kind_of
from parco.training.products import linear
from parco.training.recipe import BF16, PRODUCTS, Recipe

ROLES = {"output": ("x", "weight"), "grad_input": ("grad", "weight"), "grad_weight": ("grad", "x")}
"""The operands of each product by what they are."""


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
    chosen: dict[str, tuple[torch.nn.Module, Recipe]] = {}
    left: dict[str, str] = {}
    ends = _ends(model, recipe)
    kinds = {name: group.kind for group in groups(model) for name in group.members}
    for name, site in linears(model).items():
        module = site.module
        if site.kind == "expert" or isinstance(module, StoredLinear):
            left[name] = "experts in one tensor are not converted" if site.kind == "expert" else "a stored weight"
        elif filter_fn is not None and not filter_fn(module, name):
            left[name] = "filter_fn says no"
        elif filter_fn is None and kinds.get(name) == "router":
            left[name] = "it decides which expert runs"
        else:
            head = kinds.get(name) in ("head", "embed") and filter_fn is None
            low = not (head or name.startswith(ends)) or recipe.is_dense
            chosen[name] = module, recipe if low else BF16
    if not chosen:
        raise ValueError(f"prepare_: {type(model).__name__} has no linear layer that takes part")
    for module, own in chosen.values():
        _convert(module, own)
    return Prepared({name: own for name, (_, own) in chosen.items()}, left)


def _ends(model: torch.nn.Module, recipe: Recipe) -> tuple[str, ...]:
    """Prefixes of the names of the layers in blocks that stay in bf16."""
    names = [f"{name}." for name, _ in blocks(model)]
    count = math.ceil(recipe.ends * len(names) - 1e-9)
    first = count // 4
    return tuple(names[:first] + names[len(names) - (count - first) :]) if count else ()


def _convert(module: Any, recipe: Recipe) -> None:
    module.__class__ = _class_of(kind_of(module))
    module._recipe = recipe
    for role in ("x", "weight", "grad"):
        for part in ("scale", "history"):
            module._buffers.pop(f"{role}_{part}", None)
    for role in sorted(_delayed_roles(recipe)):
        state = DelayedScaling.start(device=module.weight.device)
        module.register_buffer(f"{role}_scale", state.scale)
        module.register_buffer(f"{role}_history", state.history)


def _delayed_roles(recipe: Recipe) -> set[str]:
    return {
        role
        for product in PRODUCTS
        for role, operand in zip(ROLES[product], getattr(recipe, product), strict=True)
        if isinstance(operand.format.scale, ScaleDelayed)
    }


@functools.cache
def _class_of(original: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The subclass of `original` that multiplies by its recipe."""
    turned = original.__name__ == "Conv1D"

    def forward(self: Any, x: Tensor) -> Tensor:
        recipe: Recipe = self._recipe
        scales = None
        if recipe.delayed:
            scales = {
                role: DelayedScaling(self._buffers[f"{role}_scale"], self._buffers[f"{role}_history"])
                for role in _delayed_roles(recipe)
            }
        weight = self.weight.T if turned else self.weight
        return linear(x, weight, self.bias, recipe, scales)

    def reduce(self: Any, protocol: int) -> Any:
        return _revived, (original,), self.__dict__

    return type(
        original.__name__,
        (original,),
        {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__reduce_ex__": reduce,
            "_original": original,
            "forward": forward,
        },
    )


def _revived(original: type[torch.nn.Module]) -> torch.nn.Module:
    """An empty converted layer, which unpickling and copying fill."""
    kind: Any = _class_of(original)
    return kind.__new__(kind)
