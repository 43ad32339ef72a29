"""Low-precision training: recipes, the layers that follow them, and an optimizer.

>>> import torch, parco.training
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
>>> print(parco.training.prepare_(model, "mxfp8"))
   2 layers: mxfp8
"""

from parco.training import recipe as recipes
from parco.training.optimizer import AdamW
from parco.training.prepare import Prepared, delayed_scales, prepare_
from parco.training.products import linear
from parco.training.recipe import RECIPES, Operand, Pair, Recipe
from parco.training.steps import optimizer_steps, weight_state

__all__ = [
    "RECIPES",
    "AdamW",
    "Operand",
    "Pair",
    "Prepared",
    "Recipe",
    "delayed_scales",
    "linear",
    "optimizer_steps",
    "prepare_",
    "recipes",
    "weight_state",
]
