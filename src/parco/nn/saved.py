"""The names under which a fitted model's tensors are saved, and what in memory they belong to.

A module's matrix W that Transformers knows as the parameter `m.weight` becomes the tensors of a Weight:
`m.weight.codes`, `m.weight.scale` and so on. Transformers without parco would find `m.weight` missing, warn, and go
on with random numbers. So each file also holds a tensor named `m.weight`: one dimension of bytes, the text of the
spec. Its shape clashes with the matrix's, which Transformers refuses to load. With parco the name belongs to no
parameter and is ignored. One more tensor has a name that says what to do, and stands in the table that Transformers
prints before it refuses."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from parco.nn.linear import carries_adapters
from parco.nn.stored import StoredWeight
from parco.products import Native, Product
from parco.weights import Weight, shared_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HINT = "saved_by_parco.import_parco_before_loading_this"
EXPERT = re.compile(r"(.+)\[(\d+)\]")
_STORED_EXPERT = re.compile(r"(.+)\.(\d+)")


@dataclass(frozen=True)
class Description:
    """weights: module name -> spec, in the order of the model's modules; tied: module name -> the name in `weights`
    that it shares; products: name in `weights` -> the Product, where it is not the native one; shared: path of a
    factor -> the path of the first that is the same one (`a.b.k_proj.weight.right` -> `a.b.q_proj.weight.right`)."""

    weights: dict[str, Weight]
    tied: dict[str, str]
    products: dict[str, Product]
    shared: dict[str, str]


def describe(model: torch.nn.Module) -> Description:
    """Every stored weight of `model` under the name that `nn.replace_` takes (`a.b.q_proj`,
    `a.b.experts.down_proj[3]`)."""
    weights: dict[str, Weight] = {}
    tied: dict[str, str] = {}
    products: dict[str, Product] = {}
    shared: dict[str, str] = {}
    owners: dict[int, str] = {}
    factors: dict[tuple[int, ...], str] = {}
    for path, module in _stored(model):
        name = _module_name(path)
        if id(module) in owners:
            tied[name] = owners[id(module)]
            continue
        owners[id(module)] = name
        weights[name] = module.spec
        if not isinstance(module.product, Native):
            products[name] = module.product
        for inner, _ in shared_parts(module.spec):
            held = tuple(map(id, module.get_submodule(inner).parameters()))
            owner = factors.setdefault(held, f"{path}.{inner}")
            if owner != f"{path}.{inner}":
                shared[f"{path}.{inner}"] = owner
    return Description(weights, tied, products, shared)


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype that the model computes in: of the first floating parameter that no stored weight owns, else the
    configuration's."""
    inside = {id(parameter) for _, module in _stored(model) for parameter in module.parameters()}
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in inside:
            return parameter.dtype
    found = model.config.dtype or torch.get_default_dtype()
    return getattr(torch, found) if isinstance(found, str) else found


def tensors_to_save(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Name -> tensor for the file: the state without tied copies and with what several layers hold under its first
    name, the clashing names, and the hint; in the order of the names. Tensors that share memory without being tied by
    the architecture, or by a weight, are copied.

    Raises ValueError if a tensor lies on the meta device (offloaded): there is nothing to write; and for adapters.
    """
    refuse_adapters(model)
    description = describe(model)
    targets: set[str] = set(getattr(model, "all_tied_weights_keys", None) or {})
    ignored: set[str] = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    state = {name: value for name, value in model.state_dict().items() if name not in ignored}
    found: dict[str, torch.Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    tied = tuple(f"{path}." for path in (*clashing_names(dict.fromkeys(description.tied, "")), *description.shared))
    for name in sorted(state, key=lambda name: (name in targets, name)):
        if name.startswith(tied):  # the same module under another name
            continue
        value = state[name]
        if value.device.type == "meta":
            raise ValueError(f"tensor {name!r} is on the meta device: load the model without offloading to save it")
        identity = memory_of(value)
        if value.numel() and identity in seen:
            if name in targets:
                continue
            value = value.clone()
        else:
            seen.add(identity)
        found[name] = value
    for name, text in clashing_names({name: str(spec) for name, spec in description.weights.items()}).items():
        found[name] = torch.frombuffer(bytearray(text.encode("utf-8")), dtype=torch.uint8)
    if description.weights:
        found[HINT] = torch.ones(1, dtype=torch.uint8)
    return dict(sorted(found.items()))


def refuse_adapters(model: torch.nn.Module) -> None:
    """Raises ValueError where a layer of `model` carries adapters, which files of models have no place for."""
    name = next((name for name, module in model.named_modules() if carries_adapters(module)), None)
    if name is not None:
        raise ValueError(
            f"{name} carries adapters: merge them first (parco.adapters.merge_, to_sum_), or save them by themselves "
            "(parco.adapters.save)"
        )


def memory_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """What two tensors that are the same numbers in the same memory have in common."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def clashing_names(weights: dict[str, str]) -> dict[str, str]:
    """Parameter name of the plain architecture -> the text stored under it, for module name -> text of its spec."""
    found: dict[str, str] = {}
    for name, text in weights.items():
        expert = EXPERT.fullmatch(name)
        if expert is None:
            found[f"{name}.weight"] = text
        else:
            found[expert[1]] = f"{found[expert[1]]}\n{text}" if expert[1] in found else text
    return found


def numbers(model: torch.nn.Module) -> int:
    """How many numbers `model` is made of, however its matrices are stored; what is shared counts once."""
    inside = {id(parameter) for _, parameter in stored_parameters(model)}
    plain = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    return plain + sum(math.prod(spec.shape) for spec in describe(model).weights.values())


def stored_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of every tensor that a stored weight owns, under each of its names."""
    for path, module in _stored(model):
        for name, parameter in module.named_parameters():
            yield f"{path}.{name}", parameter


def _stored(model: torch.nn.Module) -> Iterator[tuple[str, StoredWeight]]:
    """(path, module) of the outermost stored weights, a shared one under each of its paths."""
    outer = ""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, StoredWeight) and not (outer and path.startswith(f"{outer}.")):
            outer = path
            yield path, module


def _module_name(path: str) -> str:
    expert = _STORED_EXPERT.fullmatch(path)
    return f"{expert[1]}[{expert[2]}]" if expert else path.removesuffix(".weight")
