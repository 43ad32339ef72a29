"""Layers that carry adapters.

Such a layer gets a subclass of its own class, under the same name, and a child `adapters` with one module for each; its
own parameters, their names and its place stay. So tied weights stay tied, whoever looks for `nn.Linear` finds it, and a
state dict has more names and no others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from parco.adapters.product import Frozen, Own
from parco.formats.scales import DTYPE_NAMES
from parco.kernels.library import TYPES
from parco.kernels.linear import linear_dense
from parco.nn import StoredWeight
from parco.nn.linear import carries_adapters, kind_of, under_its_name
from parco.nn.parts import is_linear
from parco.nn.parts import rows as dense_rows
from parco.products import Product
from parco.weights import Weight

BASE = "__base__"
"""The name that stands for the model without an adapter."""


class Adapted:
    """Of every layer with adapters: which of them are active in which shares; of `per_request` the names for each row
    of the batch; and which are in the layer's own matrix, with what that was before.
    """

    _active: tuple[tuple[str, float], ...]
    _requests: tuple[str, ...] | None
    _merged: tuple[tuple[str, Any], ...]


def attach(module: Any, name: str, adapter: nn.Module) -> None:
    """Gives `module` an adapter, which is not active yet."""
    if not carries_adapters(module):
        module.__class__ = _class_of(type(module))
        module.add_module("adapters", nn.ModuleDict())
        module.__dict__.update(_active=(), _requests=None, _merged=())
    adapter.train(module.training)
    module.adapters[name] = adapter


def detach(module: Any, name: str) -> None:
    """Takes an adapter away; with the last one the module is what it was before."""
    del module.adapters[name]
    deactivate(module, name)
    if not len(module.adapters):
        del module.adapters, module._active, module._requests, module._merged
        module.__class__ = type(module).__bases__[1]


def deactivate(module: Any, name: str) -> None:
    """Has one layer compute without the adapter."""
    module._active = tuple(each for each in module._active if each[0] != name)


def merged(module: Any) -> tuple[str, ...]:
    """The adapters that are in the layer's own matrix, and could be taken out of it again."""
    return tuple(name for name, _ in module._merged)


def adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, module) of every module of `model` that carries adapters."""
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            yield name, module


def names(model: nn.Module) -> tuple[str, ...]:
    """The adapters that `model` carries, in the order in which they came."""
    return tuple(dict.fromkeys(name for _, module in adapted(model) for name in module.adapters))


def check_name(model: nn.Module, name: str) -> None:
    """ValueError, naming those that there are, unless `model` carries the adapter `name`."""
    if name not in names(model):
        raise ValueError(f"no adapter {name!r}: the model carries {', '.join(map(repr, names(model))) or 'none'}")


def set_(model: nn.Module, name: str | Mapping[str, float] | None) -> None:
    """Has `model` compute with the adapter `name`, with several in the given shares (`{"a": 0.5, "b": 0.5}`), or with
    None of them. What trains stays what it is, and what is merged stays so.

    Raises ValueError for an adapter that is not there, and for shares of one that only is there whole (DoRA, a copy of
    a module).
    """
    shares = {} if name is None else {name: 1.0} if isinstance(name, str) else dict(name)
    for each in shares:
        check_name(model, each)
    for module, own in shares_of(model, shares):
        module._active = own


def shares_of(
    model: nn.Module, shares: Mapping[str, float], out: str | None = None
) -> list[tuple[Any, tuple[tuple[str, float], ...]]]:
    """(module, what is active in it) of every module with adapters, where the model's are these. ValueError where that
    cannot be; the adapter `out` counts as taken out of the matrices.
    """
    chosen: list[tuple[Any, tuple[tuple[str, float], ...]]] = []
    for path, module in adapted(model):
        own = tuple((each, float(share)) for each, share in shares.items() if each in module.adapters and share)
        inside = next((each for each, _ in own if each in merged(module) and each != out), None)
        if inside is not None:
            raise ValueError(f"set_: {inside!r} is merged into {path} already; unmerge_ it first")
        whole = [each for each, _ in own if not module.adapters[each].additive]
        if whole and own != ((whole[0], 1.0),):
            raise ValueError(
                f"set_: {path} has an adapter that is no sum (DoRA, or a copy): it is active whole and alone"
            )
        chosen.append((module, own))
    return chosen


def active(model: nn.Module) -> dict[str, float]:
    """The shares of the adapters with which `model` computes now."""
    return dict(each for _, module in adapted(model) for each in module._active)


@contextmanager
def per_request(model: nn.Module, names: Sequence[str]) -> Generator[None]:
    """While this is open, row i of every batch is computed with the adapter names[i], alone and whole; "__base__" is
    the model without any. Each layer multiplies its own matrix once for all rows.

    Raises ValueError for an adapter that is not there or, in the forward, for a batch of another size.
    """
    requests = tuple(names)
    for name in dict.fromkeys(requests):
        if name != BASE:
            check_name(model, name)
    modules = [module for _, module in adapted(model)]
    if any(merged(module) for module in modules):
        raise ValueError("per_request: an adapter is merged into the model; unmerge_ it first")
    before = [module._requests for module in modules]
    for module in modules:
        module._requests = requests
    try:
        yield
    finally:
        for module, each in zip(modules, before, strict=True):
            module._requests = each


def _forward(self: Any, original: Any, *inputs: Any, **named: Any) -> Any:
    chosen = [(self.adapters[name], share) for name, share in self._active]
    if not chosen and self._requests is None:
        return original.forward(self, *inputs, **named)
    if not is_linear(self):
        return _of_copies(self, original, chosen, *inputs, **named)
    (x,) = (*inputs, *named.values())
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    rows = x.reshape(-1, x.shape[-1])
    product: Callable[[Tensor], Tensor] = Own(functools.partial(_multiply, self, original), _frozen(self))
    if self._requests is not None:
        y = _by_request(self, rows, product, x.shape)
    else:
        for adapter, share in chosen:
            product = functools.partial(adapter.around, layer=self, product=product, share=share)
        y = product(rows)
    return y.view(*x.shape[:-1], y.shape[-1])


def _multiply(self: Any, original: Any, x: Tensor) -> Tensor:
    """What the layer gives without adapters, in memory of its own. In 16 bits on a CPU `linear_dense` multiplies, which
    is faster than torch's.
    """
    if kind_of(self) is nn.Linear and "_recipe" not in self.__dict__ and not torch.compiler.is_compiling():
        weight = self.weight
        plain = type(weight) is nn.Parameter and weight.is_cpu and not weight.requires_grad
        if plain and x.dtype in TYPES and x.dtype != torch.float32:
            return linear_dense(x, dense_rows(self), self.bias)
    return original.forward(self, x)


def _frozen(self: Any) -> Frozen | None:
    """The layer's own matrix, where it does not train and no recipe says how it is multiplied."""
    weight, bias = self._modules.get("weight"), self._parameters.get("bias")
    if isinstance(weight, StoredWeight):
        # A compiler looks through a cache, with a warning.
        plan_of = weight.spec.plan if torch.compiler.is_compiling() else functools.partial(_plan, weight.spec)
        plan, tensors = plan_of(weight.product), weight.tensors()
    elif kind_of(self) is nn.Linear and "_recipe" not in self.__dict__:
        tensors = (dense_rows(self),)
        dtype, (outputs, columns) = DTYPE_NAMES.get(tensors[0].dtype), tensors[0].shape
        plan = f"{dtype} {outputs}x{columns}" if dtype is not None else None
    else:
        return None
    plain = all(each.is_cpu and not each.requires_grad for each in tensors)
    return Frozen(tensors, bias, plan) if plain and plan is not None else None


@functools.cache
def _plan(spec: Weight, product: Product) -> str | None:
    return spec.plan(product)


def _by_request(self: Any, rows: Tensor, product: Callable[[Tensor], Tensor], shape: torch.Size) -> Tensor:
    requests: tuple[str, ...] = self._requests
    if len(requests) != shape[0]:
        raise ValueError(f"per_request: names are {len(requests)} and the batch has {shape[0]} rows")
    y = product(rows)
    places = torch.arange(rows.shape[0], device=rows.device).view(shape[0], -1)
    for name in dict.fromkeys(requests):
        if name in self.adapters:
            chosen = torch.tensor([each == name for each in requests], device=rows.device)
            where = places[chosen].reshape(-1)
            own = y[where]
            found = self.adapters[name].around(rows[where], self, lambda _, own=own: own, 1.0)
            y = y.index_copy(0, where, found)
    return y


def _of_copies(self: Any, original: Any, chosen: list[tuple[Any, float]], *inputs: Any, **named: Any) -> Any:
    """The forward of the one active adapter's copy of a module; by requests that of each."""
    if self._requests is None:
        return chosen[0][0].module(*inputs, **named)
    x, *others = inputs
    requests: tuple[str, ...] = self._requests
    if len(requests) != x.shape[0]:
        raise ValueError(f"per_request: names are {len(requests)} and the batch has {x.shape[0]} rows")
    y = original.forward(self, x, *others, **named)
    for name in dict.fromkeys(requests):
        if name in self.adapters:
            where = torch.tensor([index for index, each in enumerate(requests) if each == name], device=x.device)
            y = y.index_copy(0, where, self.adapters[name].module(x[where], *others, **named))
    return y


@functools.cache
def _class_of(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `original` that computes with adapters."""
    parent: Any = original

    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        return _forward(self, parent, *inputs, **named)

    def reduce(self: Any, protocol: int) -> Any:
        made = parent.__reduce_ex__(self, protocol)[:2] if hasattr(original, "_original") else None
        return _revived, (original if made is None else made,), self.__dict__

    functools.update_wrapper(forward, parent.forward)  # Trainer asks the forward for the names of its arguments
    members: dict[str, object] = {"__reduce_ex__": reduce, "forward": forward}
    return under_its_name(getattr(original, "_original", original), (Adapted, original), members)


def _revived(made: Any) -> nn.Module:
    """An empty layer with adapters, which unpickling and copying fill. `made` is its class before, or a function that
    makes a layer of it and its arguments.
    """
    original = type(made[0](*made[1])) if isinstance(made, tuple) else made
    kind: Any = _class_of(original)
    return kind.__new__(kind)
