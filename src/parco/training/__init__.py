"""Low-precision training: recipes, and the layers that follow them.

>>> import torch, parco.training
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
>>> print(parco.training.prepare_(model, "mxfp8"))
   2 layers: mxfp8
"""

from parco.training import recipe as recipes
from parco.training.loss import fuse_loss_
from parco.training.prepare import Prepared, delayed_scales, prepare_
from parco.training.products import linear
from parco.training.recipe import RECIPES, Operand, Pair, Recipe

__all__ = [
    "RECIPES",
    "Operand",
    "Pair",
    "Prepared",
    "Recipe",
    "delayed_scales",
    "fuse_loss_",
    "linear",
    "prepare_",
    "recipes",
]
