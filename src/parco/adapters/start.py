"""How low-rank factors begin, other than from random numbers: with the solvers and the statistics of `parco.fitting`.

`prepare` checks everything, and computes what needs the model as it was, before a first layer is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parco.adapters.adapted import Adapted
from parco.adapters.layers import Adapter, LowRank, put_
from parco.adapters.methods import Factors, Method
from parco.fitting.observe import Moments
from parco.nn import StoredWeight, tied
from parco.nn.linear import Linear
from parco.nn.parts import rows as dense_rows
from parco.weights import Dense, Sum
from parco.weights import LowRank as LowRankWeight

Begin = Callable[[str, Any, Adapter], None]
"""Called with the name of a layer, the layer and its new adapter."""


def prepare(model: nn.Module, methods: Mapping[str, Method], inputs: Iterable[Any] | None) -> Begin:
    """What sets the adapters of these layers to their beginning, as their methods say. Raises ValueError where one
    cannot have it.
    """
    inits = _inits(methods)
    modules = dict(model.named_modules())
    for name, init in inits.items():
        if init == "pissa":
            _check_dense(model, name, modules[name])
        if init == "loftq":
            _check_own(model, name, modules[name], init)
            check_correction(name, modules[name], methods[name])
    watched = [name for name, init in inits.items() if init == "eva"]
    seen = _inputs(model, watched, inputs) if watched else {}

    def begin(name: str, layer: Any, adapter: Adapter) -> None:
        if not isinstance(adapter, LowRank):
            return
        if adapter.method.init == "pissa":
            principal_(layer, adapter)
        elif adapter.method.init == "loftq":
            _take_correction_(layer, adapter)
        elif adapter.method.init == "eva":
            adapter.lora_A.data.copy_(_leading(seen[name], adapter.method.rank))

    return begin


def check_loaded(model: nn.Module, methods: Mapping[str, Method]) -> None:
    """Raises ValueError unless trained adapters of these methods fit the layers: pissa's a dense matrix that nobody
    else computes with, loftq's one in few bits without its correction, which is in the adapter.
    """
    modules = dict(model.named_modules())
    for name, init in _inits(methods).items():
        if init == "pissa":
            _check_dense(model, name, modules[name])
        if init == "loftq" and (_corrected(modules[name], methods[name]) or not _in_few_bits(modules[name])):
            raise ValueError(
                f"init=loftq: the adapter holds what rounding {name} to few bits lost, which its matrix here has "
                "already: give the base that it was trained over, its matrices in few bits and without the correction"
            )


def _inits(methods: Mapping[str, Method]) -> dict[str, str]:
    return {name: method.init for name, method in methods.items() if isinstance(method, Factors)}


def _check_dense(model: nn.Module, name: str, layer: Any) -> None:
    """PiSSA's matrix is to be one of PyTorch's and the layer's own."""
    _check_own(model, name, layer, "pissa")
    if isinstance(layer, Linear):
        raise ValueError(f"init=pissa takes the matrix of {name} apart, which is no dense one of PyTorch's")


def _check_own(model: nn.Module, name: str, layer: Any, init: str) -> None:
    """The matrix is to be changed: nobody else may compute with it."""
    shared = [each for each in tied(model, name) if each != name]
    if shared:
        raise ValueError(f"init={init} changes the matrix of {name}, which {shared[0]} shares")
    if isinstance(layer, Adapted):
        raise ValueError(f"init={init} changes the matrix of {name}, on which another adapter stands")


@torch.no_grad()
def principal_(layer: Any, adapter: LowRank) -> None:
    """PiSSA: s·B·A becomes the best matrix of its rank for W, each factor with the roots of the singular values, and W
    what is left; it loses the product of the factors before these are rounded to their dtype. By PyTorch's SVD in fp32,
    as PEFT does, so that either finds the other's W again.
    """
    method = adapter.method
    weight = dense_rows(layer)
    left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
    root = (values[: method.rank] / method.scale).sqrt()
    a, b = root[:, None] * right[: method.rank], left[:, : method.rank] * root
    adapter.lora_A.copy_(a)
    adapter.lora_B.copy_(b)
    weight.copy_(weight.float() - method.scale * (b @ a))


def check_correction(name: str, layer: Any, method: Method) -> None:
    """Raises ValueError unless the layer's weight ends in a low-rank term of dense factors of the method's rank."""
    assert isinstance(method, Factors)
    if not _corrected(layer, method):
        raise ValueError(
            f"init=loftq takes over the low-rank correction of a weight in few bits, and {name} has none of rank "
            f"{method.rank}: convert the model first, as in parco.convert_(model, parco.Quantize('nf4:64') + "
            f"parco.Factor(rank={method.rank}))"
        )


def _corrected(layer: Any, method: Method) -> bool:
    spec = layer.weight.spec if isinstance(layer, Linear) else None
    term = spec.terms[-1] if isinstance(spec, Sum) else None
    if not (isinstance(term, LowRankWeight) and isinstance(method, Factors) and term.rank == method.rank):
        return False
    return all(isinstance(part, Dense) for part in term.parts().values())


def _in_few_bits(layer: Any) -> bool:
    return isinstance(layer, Linear) and not isinstance(layer.weight.spec, Dense)


@torch.no_grad()
def _take_correction_(layer: Any, adapter: LowRank) -> None:
    """LoftQ: the factors get what the weight's last term says, which leaves the weight."""
    stored: StoredWeight = layer.weight
    spec = stored.spec
    assert isinstance(spec, Sum)
    term = spec.terms[-1]
    count = len(term.tensors())
    left, right = (tensor.float() for tensor in stored.tensors()[-count:])
    balance = (right.norm() / left.norm().clamp_min(torch.finfo(torch.float32).tiny)).sqrt().clamp_min(1e-6)
    root = adapter.method.scale**0.5
    adapter.lora_B.copy_(left * (balance / root))
    adapter.lora_A.copy_(right / (balance * root))
    rest = spec.terms[:-1]
    tensors = spec.unpack(*stored.tensors())[:-count]
    put_(layer, StoredWeight(rest[0] if len(rest) == 1 else Sum(*rest), tensors, stored.dtype))


@torch.no_grad()
def _inputs(model: nn.Module, names: list[str], inputs: Iterable[Any] | None) -> dict[str, Tensor]:
    """[K, K] fp64 second moments of what these layers read while the model runs on `inputs`."""
    if inputs is None:
        raise ValueError("init=eva learns from what the layers read: give inputs=, some batches that the model takes")
    moments = Moments()
    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_pre_hook(_watcher(moments, name)) for name in names]
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for batch in inputs:
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, before in training.items():
            module.training = before
    silent = next((name for name in names if moments.count.get(name, 0) == 0), None)
    if silent is not None:
        raise ValueError(f"init=eva: nothing reached {silent} while the model ran on inputs=")
    return moments.gram


def _watcher(moments: Moments, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        moments.add(name, inputs[0])

    return hook


def _leading(gram: Tensor, rank: int) -> Tensor:
    """[rank, K]: the directions of most energy, orthonormal."""
    _, vectors = torch.linalg.eigh(gram)
    return vectors[:, -rank:].flip(1).t().float()
