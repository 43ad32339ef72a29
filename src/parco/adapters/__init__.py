"""Fine-tuning in few parameters: LoRA and its family, over a base in any storage.

>>> import torch, parco.adapters
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
>>> print(parco.adapters.add_(model, "lora(4)"))
   2 layers: lora(4)
1,536 of 18,112 parameters train (8.48%)
"""

from parco.adapters.adapted import active, names, per_request, set_
from parco.adapters.add import Added, add_, remove_
from parco.adapters.folder import load_, save
from parco.adapters.merge import Merged, merge_, to_sum_, unmerge_
from parco.adapters.methods import Bottleneck, DoRA, LoRA, Method, VeRA, parse

__all__ = [
    "Added",
    "Bottleneck",
    "DoRA",
    "LoRA",
    "Merged",
    "Method",
    "VeRA",
    "active",
    "add_",
    "load_",
    "merge_",
    "names",
    "parse",
    "per_request",
    "remove_",
    "save",
    "set_",
    "to_sum_",
    "unmerge_",
]
