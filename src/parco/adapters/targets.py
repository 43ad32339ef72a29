"""Which layers get an adapter: names as PEFT takes them, resolved against a model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from parco.adapters.methods import Bottleneck, Method
from parco.nn import blocks, groups, head_name, linears

Targets = Sequence[str] | str | None
Value = TypeVar("Value")

ALL_LINEAR = "all-linear"


def chosen(model: nn.Module, targets: Targets, method: Method) -> tuple[list[str], dict[str, str]]:
    """(names of the linear layers that get an adapter, in the model's order; name -> why another was left).

    None takes every linear layer of the repeated blocks but routers and experts (of a model without blocks, every one
    but the head), "all-linear" every linear layer but the head; a serial bottleneck only those that end a sublayer.
    Another string is a regular expression that a name has to match in full; a sequence holds names, whole or their last
    parts.

    Raises ValueError where something matches nothing, naming the nearest, or is no linear layer.
    """
    found = linears(model)
    left: dict[str, str] = {}
    if targets is None or targets == ALL_LINEAR:
        kinds = {name: group.kind for group in groups(model) for name in group.members}
        inside = tuple(f"{name}." for name, _ in blocks(model)) if targets is None else ()
        taken: list[str] = []
        for name, site in found.items():
            if name == head_name(model) or kinds.get(name) in ("head", "embed"):
                left[name] = "the output head"
            elif site.kind == "expert":
                left[_stack(name)] = "experts in one tensor take no adapter"
            elif inside and not name.startswith(inside):
                left[name] = "outside the repeated blocks"
            elif targets is None and kinds.get(name) == "router":
                left[name] = "it decides which expert runs"
            elif targets is None and serial(method) and inside and kinds.get(name) not in ("out", "down"):
                left[name] = "no sublayer ends with it"
            else:
                taken.append(name)
        if not taken:
            raise ValueError(f"targets={targets!r}: {type(model).__name__} has no linear layer for them")
        return taken, left
    modules = dict(model.named_modules())
    if isinstance(targets, str):
        named = [name for name in modules if _matches(targets, name)]
        if not named:
            raise ValueError(f"targets={targets!r} matches no module{nearest(targets, modules)}")
    else:
        for each in targets:
            if not any(ends(name, each) for name in modules):
                raise ValueError(f"targets: {each!r} is the name of no module{nearest(each, modules)}")
        named = [name for name in modules if any(ends(name, each) for each in targets)]
    if not named:
        raise ValueError("targets is empty: name at least one layer, or give None for the linear layers of the blocks")
    for name in named:
        if name not in found:
            raise ValueError(f"targets: {name!r} is a {type(modules[name]).__name__}; adapters stand on linear layers")
    return named, left


def serial(method: Method) -> bool:
    """Whether this is a network on a layer's output."""
    return isinstance(method, Bottleneck) and method.placement == "serial"


def modules_named(model: nn.Module, names: Iterable[str], argument: str) -> list[str]:
    """The modules whose names are, or end in, one of `names`. Raises ValueError for one that is none's."""
    modules = dict(model.named_modules())
    for each in names:
        if not any(ends(name, each) for name in modules):
            raise ValueError(f"{argument}: {each!r} is the name of no module{nearest(each, modules)}")
    return [name for name in modules if any(ends(name, each) for each in names)]


def ends(name: str, part: str) -> bool:
    """Whether `part` is the name, or its last parts."""
    return bool(part) and (name == part or name.endswith(f".{part}"))


def by_pattern(patterns: Mapping[str, Value], name: str) -> Value | None:
    """The value of the first pattern that matches the end of a layer's name, as PEFT's rank_pattern does."""
    for pattern, value in patterns.items():
        if _matches(rf"(.*\.)?({pattern})", name):
            return value
    return None


def check_patterns(patterns: Mapping[str, Any], names: Sequence[str], argument: str) -> None:
    """Raises ValueError for a pattern that matches none of the layers."""
    for pattern in patterns:
        if by_pattern({pattern: True}, "") is None and not any(by_pattern({pattern: True}, name) for name in names):
            raise ValueError(
                f"{argument}: {pattern!r} matches none of the {len(names)} layers with adapters"
                f"{nearest(pattern, dict.fromkeys(names))}"
            )


def nearest(name: str, known: Mapping[str, Any]) -> str:
    """ "; the nearest are ...", or nothing where no known name is like it."""
    leaves = dict.fromkeys(each.rpartition(".")[2] for each in known if each and not each.rpartition(".")[2].isdigit())
    candidates = known if "." in name else leaves
    close = difflib.get_close_matches(name, list(candidates), n=3, cutoff=0.5)
    close = close or [each for each in leaves if name.rpartition(".")[2] in each][:3]
    return f"; the nearest are {', '.join(close)}" if close else f"; there are {', '.join(list(leaves)[:6])}, …"


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error})") from None


def _stack(name: str) -> str:
    return re.sub(r"\[\d+\]$", "", name)
