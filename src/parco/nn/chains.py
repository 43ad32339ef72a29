"""Products of layers with everything but x settled, for compiled code that calls several in a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parco import _C
from parco.formats.scales import DTYPE_NAMES
from parco.kernels.linear.prepared import prepared
from parco.nn import joined
from parco.nn.linear import Linear
from parco.nn.parts import rows
from parco.products.how import NATIVE, Product
from parco.weights import Dense, Weight


def chains(layers: Sequence[Any], dtype: torch.dtype) -> list[_C.Chain] | None:
    """One product for all of `layers` where they lie side by side, else one each; None without a compiled kernel, or
    where a layer multiplies by a recipe of its own (`parco.training`).
    """
    if any("_recipe" in layer.__dict__ for layer in layers):
        return None
    whole = joined.joined(layers) if len(layers) > 1 else None
    if whole is not None:
        products = [chain(*whole, dtype, layers[0].weight.product)]
    else:
        products = [
            chain(layer.weight.spec, layer.weight.tensors(), layer.bias, dtype, layer.weight.product)
            if isinstance(layer, Linear)
            else chain(*dense(rows(layer)), layer.bias, dtype)
            for layer in layers
        ]
    found = [product for product in products if product is not None]
    return found if len(found) == len(products) else None


def dense(matrix: Tensor) -> tuple[Dense, tuple[Tensor]]:
    """The spec and the tensors of a matrix [N, K] as it is."""
    return Dense((matrix.shape[0], matrix.shape[1]), DTYPE_NAMES[matrix.dtype]), (matrix,)


def chain(
    spec: Weight, tensors: tuple[Tensor, ...], bias: Tensor | None, dtype: torch.dtype, product: Product = NATIVE
) -> _C.Chain | None:
    """The product with the matrix that `tensors` are, of one row of x."""
    plan = spec.plan(product)
    return None if plan is None else prepared(dtype, tensors, bias, plan)
