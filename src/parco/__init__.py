"""parco makes a transformer cheaper on this machine, and says what each way costs.

    import parco
    parco.convert_(model, parco.Quantize("int4:32"))     # one method everywhere, in place
    parco.fit("folder", size=0.35, out="smaller")        # the main job, as `parco fit` runs it

Importing parco also makes `AutoModelForCausalLM.from_pretrained` understand the folders that it saves. The main job
(fitting, the page) is loaded when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch as torch  # before parco._C: the extension then shares the libgomp that torch has loaded

__version__ = "0.1.0"

if TYPE_CHECKING:
    from parco import adapters, formats, machine, nn, training, weights
    from parco.fitting.methods import Factor, Joint, Prune, Quantize, Rotate, Scale
    from parco.job import convert_, fit
    from parco.kernels.cast import Hadamard, decode, encode, encode_both, encode_transposed
    from parco.kernels.table import explain
    from parco.nn.fuse import fuse_
    from parco.products import matmul

__all__ = [
    "Factor",
    "Hadamard",
    "Joint",
    "Prune",
    "Quantize",
    "Rotate",
    "Scale",
    "adapters",
    "convert_",
    "decode",
    "encode",
    "encode_both",
    "encode_transposed",
    "explain",
    "fit",
    "formats",
    "fuse_",
    "machine",
    "matmul",
    "nn",
    "training",
    "weights",
]

_HOMES = {
    "Factor": "parco.fitting.methods",
    "Joint": "parco.fitting.methods",
    "Hadamard": "parco.kernels.cast",
    "Prune": "parco.fitting.methods",
    "Quantize": "parco.fitting.methods",
    "Rotate": "parco.fitting.methods",
    "Scale": "parco.fitting.methods",
    "convert_": "parco.job",
    "decode": "parco.kernels.cast",
    "encode": "parco.kernels.cast",
    "encode_both": "parco.kernels.cast",
    "encode_transposed": "parco.kernels.cast",
    "explain": "parco.kernels.table",
    "fit": "parco.job",
    "fuse_": "parco.nn.fuse",
    "matmul": "parco.products",
}


def __getattr__(name: str) -> Any:
    """Names and submodules on first use (PEP 562)."""
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in ("adapters", "formats", "machine", "nn", "training", "weights"):
        value = importlib.import_module(f"parco.{name}")
    else:
        raise AttributeError(f"module 'parco' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    from parco.hub.registration import register

    register()


_register()
