"""Low-precision training: recipes, the layers that follow them, and an optimizer.

>>> import torch, parco.training
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
>>> print(parco.training.prepare_(model, "mxfp8"))
   2 layers: mxfp8
"""

from parco.training import recipe as recipes
from parco.training.diagnose import Finding, diagnose, fall_back_
from parco.training.layer import linear
from parco.training.loss import fuse_loss_
from parco.training.once import once_per_step
from parco.training.optimizer import AdamW
from parco.training.prepare import Prepared, delayed_scales, prepare_, recipes_of
from parco.training.readings import Reading, Readings
from parco.training.recipe import RECIPES, Operand, Pair, Recipe
from parco.training.watch import Watch

__all__ = [
    "RECIPES",
    "AdamW",
    "Finding",
    "Operand",
    "Pair",
    "Prepared",
    "Reading",
    "Readings",
    "Recipe",
    "Watch",
    "delayed_scales",
    "diagnose",
    "fall_back_",
    "fuse_loss_",
    "linear",
    "once_per_step",
    "prepare_",
    "recipes",
    "recipes_of",
]
