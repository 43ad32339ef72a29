"""Other libraries' products, each as its users get it on a CPU. None of them is needed: what is not installed is left
out.

llama.cpp is not among them: it lays weights out when a model is loaded and multiplies within a graph of its own, so its
products are timed in whole models only (`parco.bench.speeds`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

BASELINE = "torch bf16"


def nbytes(*stored: Any) -> int:
    """Bytes of all tensors, of those inside a tensor subclass, and of a module's parameters and buffers."""
    total = 0
    for one in stored:
        if isinstance(one, torch.nn.Module):
            total += nbytes(*one.parameters(), *one.buffers())
        elif hasattr(one, "__tensor_flatten__"):
            total += nbytes(*(getattr(one, name) for name in one.__tensor_flatten__()[0]))
        else:
            total += one.nbytes
    return total


@dataclass(frozen=True)
class Contender:
    """One way to multiply: `make(weight)` stores an fp32 matrix [N, K], `run(x, *stored)` multiplies by it, and
    `size(*stored)` is how many bytes that is. `kernel` is parco's own, empty for a peer; `element` is what the
    multiply-adds are made of.
    """

    name: str
    element: str
    make: Callable[[Tensor], tuple[Any, ...]]
    run: Callable[..., Tensor]
    kernel: str = ""
    size: Callable[..., int] = nbytes


def installed() -> tuple[str, ...]:
    """The names of the peers that can be imported here."""
    return tuple(name for name in PEERS if importlib.util.find_spec(name))


def check(names: Sequence[str]) -> None:
    """Raises ValueError for a peer that is not known or not installed."""
    here = installed()
    for name in names:
        if name not in here:
            state = "is not installed" if name in PEERS else "is no peer"
            raise ValueError(f"--peers {name} {state}; here are {', '.join(here)}")


def of(names: Sequence[str]) -> list[Contender]:
    """The contenders of the peers called `names`."""
    return [contender for name in names for contender in PEERS[name]()]


def _torch() -> list[Contender]:
    return [
        Contender("torch fp32", "fp32", lambda w: (w.clone(),), lambda x, w: linear(x.float(), w)),
        Contender(BASELINE, "bf16", lambda w: (w.bfloat16(),), linear),
        Contender("torch int8pack", "fp32", _int8pack, torch.ops.aten._weight_int8pack_mm),
        Contender("torch int4pack:32", "fp32", _int4pack, _run_int4pack),
        Contender("torch int_mm", "int8", _int_mm, _run_int_mm),
    ]


def _int8pack(weight: Tensor) -> tuple[Tensor, ...]:
    if weight.shape[1] % 32:
        # It does not check: the process would end here (seen with 50 inputs, torch 2.13).
        raise RuntimeError("it takes multiples of 32 inputs")
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale[:, 0].bfloat16()


def _int4pack(weight: Tensor) -> tuple[Tensor, ...]:
    """Codes, and for each group of 32 a scale and a zero, as _weight_int4pack_mm_for_cpu wants them."""
    rows, columns = weight.shape
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed, torch.full((columns // 32, rows, 2), 0.01, dtype=torch.bfloat16)


def _run_int4pack(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, scales)


def _int_mm(weight: Tensor) -> tuple[Tensor, ...]:
    return (torch.randint(-127, 128, tuple(weight.shape), dtype=torch.int8),)


def _run_int_mm(x: Tensor, weight: Tensor) -> Tensor:
    """The product alone, without the quantization of x and the scales that a user of it adds."""
    return torch.ops.aten._int_mm(x.view(torch.int8)[:, : weight.shape[1]], weight.T)


def _torchao() -> list[Contender]:
    """Weights in int8, x in bf16 or rounded to int8 too; as Transformers runs them, and compiled, as torchao advises.
    Version 0.18 has no int4 for x86.
    """
    import torch._dynamo

    quantization: Any = import_module("torchao.quantization")
    torch._dynamo.reset()  # it compiles for 8 shapes and then quietly stops
    compiled: Callable[..., Tensor] = torch.compile(linear, dynamic=False)
    configs = {
        "torchao int8": quantization.Int8WeightOnlyConfig(),
        "torchao int8 dynamic": quantization.Int8DynamicActivationInt8WeightConfig(),
    }

    def stored(weight: Tensor, config: Any) -> tuple[Tensor, ...]:
        module = torch.nn.Linear(*weight.T.shape, bias=False, dtype=torch.bfloat16)
        module.weight = torch.nn.Parameter(weight.bfloat16(), requires_grad=False)
        quantization.quantize_(module, config)
        return (module.weight,)

    return [
        Contender(f"{name}{suffix}", "int8", lambda w, config=config: stored(w, config), run)
        for name, config in configs.items()
        for suffix, run in (("", linear), (" compiled", compiled))
    ]


def _bitsandbytes() -> list[Contender]:
    """Its two linear layers, without what it fetches from the hub where the package `kernels` is installed."""
    layers: Any = import_module("bitsandbytes").nn

    def nf4(weight: Tensor) -> tuple[Any, ...]:
        rows, columns = weight.shape
        module = layers.Linear4bit(
            columns, rows, bias=False, compute_dtype=torch.bfloat16, compress_statistics=False, quant_type="nf4"
        )
        module.weight = layers.Params4bit(
            weight.bfloat16(), requires_grad=False, compress_statistics=False, quant_type="nf4"
        )
        return (module.to("cpu").eval(),)

    def int8(weight: Tensor) -> tuple[Any, ...]:
        rows, columns = weight.shape
        module = layers.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=0.0)
        module.weight = layers.Int8Params(weight.bfloat16(), requires_grad=False, has_fp16_weights=False)
        return (module.to("cpu").eval(),)

    def run(x: Tensor, module: Any) -> Tensor:
        return module(x)

    return [
        Contender("bitsandbytes nf4:64", "bf16", nf4, run, size=lambda m: nbytes(m, m.weight.quant_state.absmax)),
        Contender("bitsandbytes int8", "int8", int8, run, size=lambda m: nbytes(m.state.CB, m.state.SCB)),
    ]


PEERS: dict[str, Callable[[], list[Contender]]] = {
    "torch": _torch,
    "torchao": _torchao,
    "bitsandbytes": _bitsandbytes,
}
"""Libraries by the name under which they are imported. PyTorch is always here, and its bf16 is what ratios are to."""
