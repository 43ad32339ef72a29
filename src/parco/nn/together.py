"""One product for q, k and v of several rows, while attention's own forward asks for them one at a time.

The forward runs with a stand-in for the module: asked for one of the three products, it computes all three, whose
matrices lie side by side (`joined`), and keeps the others until the forward is over. So x is rounded and laid out once,
and the outputs of narrow keys and values share their panels; the numbers are the same, since no output's sum depends on
its neighbours. Gate and up gain nothing by it: they are wide, and their halves would have to be copied for `gated`.
"""

from __future__ import annotations

import dis
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from parco.kernels.library import TYPES, undispatched
from parco.nn import joined, proofs
from parco.nn.linear import Linear
from parco.nn.parts import PROJECTIONS

LEAST_ROWS = 32
"""Of x, from which on one product saves more than the stand-in costs."""


def keeps_its_input(forward: Callable[..., Any]) -> bool:
    """Whether the code neither writes into tensors nor into its module, as far as its instructions tell."""
    return not any(
        each.opname in ("STORE_SUBSCR", "STORE_ATTR") or (each.opname == "BINARY_OP" and each.argrepr.endswith("="))
        for each in dis.get_instructions(forward)
    )


class Together:
    """Three layers side by side, and what shows that they still are."""

    __slots__ = ("seen", "sizes", "whole")

    def __init__(self, layers: list[Any]) -> None:
        self.seen = _seen(layers)
        self.whole = joined.joined(layers)
        self.sizes = [layer.out_features for layer in layers]

    def multiply(self, x: Tensor, layers: list[Any]) -> tuple[Tensor, ...]:
        """The results of all, views of one tensor."""
        assert self.whole is not None
        spec, tensors, bias = self.whole
        y = spec.apply(x, *tensors, bias=bias, product=layers[0].weight.product)
        return y.split(self.sizes, dim=-1)


def _seen(layers: list[Any]) -> list[Any]:
    found: list[Any] = []
    for layer in layers:
        weight, bias = layer._modules["weight"], layer._parameters["bias"]
        found += (weight.spec, weight._packed, weight._product, None if bias is None else bias.data_ptr())
        found += map(Tensor.data_ptr, weight.tensors())
    return found


class StandIn:
    """Attention as its forward sees it: the module, but for the three products."""

    def __init__(self, module: nn.Module, layers: list[Any], together: Together) -> None:
        self._module, self._layers, self._together = module, layers, together
        self._x: Tensor | None = None
        self._version = 0
        self._results: list[Tensor | None] = []

    def __getattr__(self, name: str) -> Any:
        if name in PROJECTIONS:
            return partial(self._multiply, PROJECTIONS.index(name))
        return getattr(self._module, name)

    def _multiply(self, index: int, x: Tensor) -> Tensor:
        version = 0 if x.is_inference() else x._version
        if self._x is None:
            self._x, self._version = x, version
            self._results = list(self._together.multiply(x, self._layers))
        if x is self._x and version == self._version:
            found, self._results[index] = self._results[index], None
            if found is not None:
                return found
        return self._layers[index](x)


def standing_in(module: Any, x: Any) -> Any:
    """What attention's forward is run with for x: a StandIn where one product gives q, k and v, else the module."""
    if not isinstance(x, Tensor) or x.ndim < 2 or x.dtype not in TYPES or x.numel() < LEAST_ROWS * x.shape[-1]:
        return module
    if not undispatched(x):
        return module
    layers: list[Any] = [module._modules[name] for name in PROJECTIONS]
    for layer in layers:
        if layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
            return module
    if {type(layer) for layer in layers} != {Linear}:
        return module
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if proofs.hooked_everywhere() or implementation not in ("sdpa", "eager"):
        return module
    together: Together | None = module.__dict__.get(proofs.STATE)
    if together is None or together.seen != _seen(layers):
        together = module.__dict__[proofs.STATE] = Together(layers)
    return module if together.whole is None else StandIn(module, layers, together)
