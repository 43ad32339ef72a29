"""Chooses how stored weights are multiplied: by x as it is, or by x rounded to int8 (`parco.products.Activations`)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from parco.nn.stored import StoredWeight
from parco.products import Product, parse


def set_product_(
    model: torch.nn.Module, product: Product | str, filter_fn: Callable[[str], bool] | None = None
) -> tuple[str, ...]:
    """Every stored weight of `model` that takes `product` (or its text, such as "activations(int8)" or "native") is
    multiplied by it from now on; returns their dotted names.

    `filter_fn(name)` leaves out those of which it says no. The tensors stay as they are, so this can be changed at any
    time; a saved model keeps it. Raises ValueError where no weight takes it.
    """
    chosen = parse(product)
    found: list[str] = []
    parts: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, StoredWeight) or id(module) in parts:
            continue
        parts.update(id(part) for part in module.modules())
        if module.spec.takes(chosen) and (filter_fn is None or filter_fn(name)):
            module.product = chosen
            found.append(name)
    if not found:
        raise ValueError(f"set_product_: no stored weight of {type(model).__name__} that is asked for takes {chosen}")
    return tuple(found)
