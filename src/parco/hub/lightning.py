"""Recipes in PyTorch Lightning: a precision plugin.

    Trainer(plugins=ParcoPrecision("nvfp4"))

Needs `lightning`, which nothing else here does: import this module by its name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from parco.training import RECIPES, Prepared, Recipe, prepare_


class ParcoPrecision(MixedPrecision):
    """Mixed precision whose linear layers follow a recipe (a Recipe or its text): `prepare_` with `filter_fn`, autocast
    in bf16 between them; under "fp16" autocast in fp16 with a dynamic loss scale.

    `device` is the type of device that autocast is for, by default CUDA where there is one. `prepared` says, once a
    trainer has taken the module, which layers follow. Raises what `prepare_` raises.
    """

    prepared: Prepared | None = None

    def __init__(
        self,
        recipe: Recipe | str,
        filter_fn: Callable[[nn.Module, str], bool] | None = None,
        device: str | None = None,
    ) -> None:
        self.recipe, self.filter_fn = Recipe.parse(recipe), filter_fn
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        half = self.recipe == RECIPES["fp16"]
        super().__init__("16-mixed" if half else "bf16-mixed", kind, torch.amp.GradScaler(kind) if half else None)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """The module, its linear layers converted in place."""
        self.prepared = prepare_(module, self.recipe, self.filter_fn)
        return module
