"""Ties: embeddings and heads that share one matrix.

Transformers ties parameters by name: `_tied_weights_keys` and `all_tied_weights_keys` map a target ("lm_head.weight")
to its source, and `tie_weights` assigns the one to the other whenever it likes, on load and on save too. On the meta
device nothing is assigned yet, so a tie is known by those names or by the two modules holding the same object,
whichever says so. After a replacement both modules hold the same StoredWeight and the names are rewritten to its
tensors: `lm_head.weight.codes`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from parco.nn.stored import StoredWeight

_WEIGHT_NAME = re.compile(r"(.*)\.weight(?:\.[\w.]+)?")


def tied(model: torch.nn.Module, name: str) -> tuple[str, ...]:
    """Names of all modules that share the `weight` of module `name`, itself among them, in the model's order."""
    owners = {path: _held(module) for path, module in model.named_modules() if _held(module) is not None}
    group = {name}
    while True:
        held = {id(owners[path]) for path in group if path in owners}
        grown = group | {path for path, weight in owners.items() if id(weight) in held}
        for target, source in declared(model).items():
            if target in grown or source in grown:
                grown |= {target, source}
        if grown == group:
            return tuple(path for path in owners if path in group)
        group = grown


def declared(model: torch.nn.Module) -> dict[str, str]:
    """Modules that Transformers declares to share a weight: {target: source}."""
    pairs = {
        _owner(target): _owner(source)
        for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items()
    }
    return {target: source for target, source in pairs.items() if target and source}


def rename(model: torch.nn.Module, names: tuple[str, ...], stored: StoredWeight) -> None:
    """Tells Transformers the names under which the modules `names` share `stored` from now on. Leaves plain torch
    models alone.
    """
    leaves = [leaf for leaf, _ in stored.named_parameters()]
    for prefix, module in model.named_modules():
        lead = f"{prefix}." if prefix else ""
        local = {name.removeprefix(lead) for name in names if name.startswith(lead)}
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            mapping = getattr(module, attribute, None)
            if isinstance(mapping, Mapping) and any(_owner(target) in local for target in mapping):
                setattr(module, attribute, _renamed(dict(mapping), local, leaves))


def _renamed(mapping: dict[str, str], local: set[str], leaves: list[str]) -> dict[str, str]:
    renamed: dict[str, str] = {}
    for target, source in mapping.items():
        if _owner(target) in local and _owner(source) in local:
            renamed |= {f"{_owner(target)}.weight.{leaf}": f"{_owner(source)}.weight.{leaf}" for leaf in leaves}
        else:
            renamed[target] = source
    return renamed


def _owner(parameter: str) -> str:
    """The module whose `weight`, or one of whose weight's tensors, `parameter` names; empty where it names something
    else.
    """
    found = _WEIGHT_NAME.fullmatch(parameter)
    return found[1] if found else ""


def _held(module: torch.nn.Module) -> torch.nn.Parameter | StoredWeight | None:
    held = getattr(module, "weight", None)
    return held if isinstance(held, torch.nn.Parameter | StoredWeight) else None
