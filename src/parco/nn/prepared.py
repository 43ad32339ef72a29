"""What a layer's call of compiled code needs (`decode`): addresses of tensors, kernels chosen, and what shows that they
are still right.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parco import _C, machine
from parco.formats.scales import DTYPE_NAMES
from parco.kernels.activations import NUMBERS
from parco.kernels.library import TYPES
from parco.kernels.linear.prepared import prepared
from parco.nn import joined
from parco.nn.linear import Linear, kind_of
from parco.products.how import NATIVE, Product
from parco.weights import Dense, Weight

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
NORMS = ("q_norm", "k_norm")
"""Children of attention: what is multiplied, and what queries and keys are normalized by, where they are."""


@dataclass(frozen=True)
class Settings:
    """(epsilon, offset, rounded) of the norms before attention, before the gate, and of queries and keys where they
    have one; the gate's activation; the classes of attention, gate and norms, before they were fused.
    """

    before: tuple[float, float, bool]
    between: tuple[float, float, bool]
    of_heads: tuple[tuple[float, float, bool], ...]
    activation: str
    kinds: tuple[type, ...]


@dataclass(frozen=True, eq=False)
class Prepared:
    """The call, None where no compiled kernels serve, and what shows that it is still right: what `owners` hold under
    `keys` are the `values`, and `tensors` lie at `addresses`. No `hooks` may be there.
    """

    call: _C.DecoderLayer | None
    dtype: torch.dtype
    columns: int
    key_heads: int
    isa: str
    owners: tuple[dict[str, Any], ...]
    keys: tuple[str, ...]
    values: tuple[Any, ...]
    tensors: tuple[Tensor, ...]
    addresses: list[int]
    parts: tuple[nn.Module, ...]
    kinds: tuple[type, ...]
    hooks: tuple[Any, ...]

    @property
    def holds(self) -> bool:
        return (
            all(map(operator.is_, map(dict.get, self.owners, self.keys), self.values))
            and all(map(operator.is_, map(type, self.parts), self.kinds))
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
            and machine.isa() == self.isa
        )


def groups(module: Any, kind: str) -> Iterator[list[nn.Module]]:
    """The layers in a fused module of this kind that multiply one input."""
    if kind == "layer":
        yield [getattr(module.self_attn, name) for name in PROJECTIONS]
    elif kind == "gate" and "gate_proj" in module._modules:
        yield [module.gate_proj, module.up_proj]


def prepare(module: Any, settings: Settings, dtype: torch.dtype, width: int) -> Prepared:
    """What a token of `dtype` takes in this layer as it is now, heads of `width` numbers."""
    attention, gate = module.self_attn, module.mlp
    norms = [module.input_layernorm, module.post_attention_layernorm]
    norms += [getattr(attention, name) for name in NORMS if name in attention._modules]
    parts = tuple(module.modules())[1:]
    tensors = tuple(module.parameters())
    found: list[tuple[dict[str, Any], str, Any]] = [
        (module._modules, name, each) for name, each in module._modules.items()
    ]
    for part in parts:
        found += [(part._modules, name, each) for name, each in part._modules.items()]
        found += [(part._parameters, name, each) for name, each in part._parameters.items()]
        found += [(part.__dict__, name, part.__dict__.get(name)) for name in ("forward", "_packed", "_product")]
    owners, keys, values = zip(*found, strict=True)
    plain = not any("forward" in part.__dict__ for part in parts)
    if plain and tuple(map(kind_of, (attention, gate, *norms))) == settings.kinds:
        places = [
            [getattr(attention, name) for name in PROJECTIONS],
            [attention.o_proj],
            [gate.gate_proj, gate.up_proj],
            [gate.down_proj],
        ]
        weights = [norm.weight for norm in norms]
        call = _call(settings, dtype, width, attention.scaling, weights, places, tensors)
    else:
        call = None
    return Prepared(
        call,
        dtype,
        attention.o_proj.out_features if call else 0,
        attention.k_proj.out_features // width if call else 0,
        machine.isa(),
        owners,
        keys,
        values,
        tensors,
        [tensor.data_ptr() for tensor in tensors],
        parts,
        tuple(map(type, parts)),
        tuple(hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)),
    )


def _call(
    settings: Settings,
    dtype: torch.dtype,
    width: int,
    scale: float,
    weights: list[Tensor],
    places: list[list[Any]],
    tensors: tuple[Tensor, ...],
) -> _C.DecoderLayer | None:
    """The compiled layer, `places` its matrices and `weights` those of its norms; None where a matrix is of a kind, or
    somewhere, that no compiled kernel reads.
    """
    layers = [each for place in places for each in place]
    plain = all(type(t) in (Tensor, nn.Parameter) and t.is_cpu for t in tensors)
    if dtype not in TYPES or not plain or not all(isinstance(x, Linear) or kind_of(x) is nn.Linear for x in layers):
        return None
    heads, key_heads, value_heads = (layer.out_features // width for layer in places[0])
    columns, inner = places[1][0].out_features, places[3][0].in_features
    fits = key_heads == value_heads and heads % key_heads == 0 and width % 2 == 0
    sizes = [columns, columns, width, width]
    for weight, size in zip(weights, sizes, strict=False):
        fits = fits and weight.dtype == dtype and weight.is_contiguous() and tuple(weight.shape) == (size,)
    products = [_products(place, dtype) for place in places]
    if not fits or any(place is None for place in products):
        return None
    before, between, *of_heads = (
        _C.Scaling(weight.data_ptr(), *numbers)
        for weight, numbers in zip(weights, (settings.before, settings.between, *settings.of_heads), strict=True)
    )
    call = _C.DecoderLayer(
        isa="avx512" if machine.isa() == "amx" else machine.isa(),
        columns=columns,
        heads=heads,
        key_heads=key_heads,
        head=width,
        turning=width,
        inner=inner,
        scale=scale,
        type=TYPES[dtype],
        activation=NUMBERS[settings.activation],
        before=before,
        between=between,
        of_heads=of_heads,
    )
    for place, together in enumerate(products):
        for product in together or ():
            call.multiply(place, product)
    return call


def _products(layers: list[Any], dtype: torch.dtype) -> list[_C.Chain] | None:
    """One product for all of `layers` where they lie side by side, else one each; None without a compiled kernel."""
    whole = joined.joined(layers) if len(layers) > 1 else None
    if whole is not None:
        products = [_product(*whole, dtype, layers[0].weight.product)]
    else:
        products = [
            _product(layer.weight.spec, layer.weight.tensors(), layer.bias, dtype, layer.weight.product)
            if isinstance(layer, Linear)
            else _product(
                Dense(tuple(layer.weight.shape), DTYPE_NAMES[layer.weight.dtype]), (layer.weight,), layer.bias, dtype
            )
            for layer in layers
        ]
    found = [product for product in products if product is not None]
    return found if len(found) == len(products) else None


def _product(
    spec: Weight, tensors: tuple[Tensor, ...], bias: Tensor | None, dtype: torch.dtype, product: Product = NATIVE
) -> _C.Chain | None:
    plan = spec.plan(product)
    return None if plan is None else prepared(dtype, tensors, bias, plan)
