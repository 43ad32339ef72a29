"""Adapters in folders: written whole or not at all, and checked before a byte of the model changes."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from parco.adapters import adapted, peft, start
from parco.adapters.add import Added, added, check_copies, check_name, check_size, install, projections
from parco.adapters.layers import Adapter, LowRank, Projections, Whole, make, of_layer
from parco.adapters.methods import Factors, Method, VeRA, parse
from parco.adapters.targets import nearest
from parco.hub.checks import check_finite_tensors, check_safetensors, read_json
from parco.hub.save import Content, whole, write_extra
from parco.nn import linears
from parco.nn.parts import shape

_MARK = "parco"
"""In the metadata of the tensors' file: the text of the method. So parco wrote the folder, and may replace it."""


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    extra: Mapping[str, Content] | None = None,
) -> Path:
    """Writes the adapter `name` as PEFT's two files, which `peft.PeftModel.from_pretrained` loads (but for bottleneck
    adapters, which PEFT has not), and `extra` ones beside them; returns the folder, which is whole or absent. Tensors
    keep their dtype. A folder that an adapter was saved in is replaced.

    Raises ValueError where the model carries no such adapter, FileExistsError where the folder holds something else,
    OSError where it cannot be written.
    """
    adapted.check_name(model, name)
    target = Path(folder).expanduser().resolve()
    _refuse_foreign(target)
    adapters = {path: module.adapters[name] for path, module in adapted.adapted(model) if name in module.adapters}
    config = peft.config_of(model, adapters)
    tensors = peft.tensors_of(adapters)
    with whole(target, sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        metadata = {"format": "pt", _MARK: str(next(each.method for each in adapters.values() if each.method))}
        save_file(tensors, temporary / peft.TENSORS, metadata=metadata)
        (temporary / peft.CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_extra(temporary, extra)
    return target


def load_(model: nn.Module, folder: str | os.PathLike[str], name: str = "default", *, trainable: bool = False) -> Added:
    """Gives `model` the adapter that PEFT or `save` wrote in `folder`, in fp32; it is active then. With `trainable` it
    trains and all else is frozen, as after `add_`; without, nothing of it trains. A PiSSA adapter's base is changed as
    PEFT changes it.

    Raises FileNotFoundError where there is no such folder, ValueError for files that are absent, broken or of a kind
    not known here, for an adapter of another model, naming the first tensor that does not fit, and for a LoftQ adapter
    over a base that lacks nothing: it holds the correction of a base in few bits. Then nothing is changed.
    """
    place = Path(folder).expanduser()
    check_name(model, name)
    config = _read_config(place)
    tensors = _read_tensors(place)
    where = repr(str(place / peft.CONFIG))
    method = _begun(peft.method_of(config, where), place)
    layers, copies = peft.sorted_names(tensors, config.get("modules_to_save") or (), repr(str(place / peft.TENSORS)))
    adapters = _made(model, method, config, layers, tensors, str(place))
    wholes = _copied(model, copies, tensors, list(layers), str(place))
    methods = {path: each.method for path, each in adapters.items() if each.method is not None}
    start.check_loaded(model, methods)
    modules = dict(model.named_modules())
    for path, adapter in adapters.items():
        if isinstance(adapter, LowRank) and adapter.method.init == "pissa":
            start.principal_(modules[path], adapter)
        _fill(adapter, layers[path], tensors)
    install(model, name, {**adapters, **wholes}, trainable)
    return added(model, name, methods, wholes, {})


def _refuse_foreign(target: Path) -> None:
    """Raises FileExistsError unless `target` is absent, empty, or an adapter's folder that parco wrote."""
    if not target.exists():
        return
    remedy = "name a folder that is new, empty, or an adapter's that parco saved"
    if not target.is_dir():
        raise FileExistsError(f"{str(target)!r} is a file: {remedy}")
    if not any(target.iterdir()):
        return
    with suppress(OSError, SafetensorError), safe_open(target / peft.TENSORS, framework="pt") as content:
        if _MARK in (content.metadata() or {}):
            return
    raise FileExistsError(f"{str(target)!r} holds files that parco did not save and would replace: {remedy}")


def _read_config(place: Path) -> dict[str, Any]:
    if not place.exists():
        raise FileNotFoundError(f"no folder {str(place)!r}: give the folder of an adapter, with its {peft.CONFIG}")
    if not (place / peft.CONFIG).is_file():
        raise ValueError(f"{str(place)!r} is no adapter: it has no {peft.CONFIG}")
    return read_json(place / peft.CONFIG)


def _read_tensors(place: Path) -> dict[str, Tensor]:
    file = place / peft.TENSORS
    if not file.is_file():
        raise ValueError(f"{str(place)!r} has no {peft.TENSORS}; have PEFT save it as safetensors")
    check_safetensors(file)
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} is not safetensors ({error}): copy it again") from error
    check_finite_tensors(iter(tensors.items()), str(file))
    return tensors


def _begun(method: Method, place: Path) -> Method:
    """`method`, with its beginning where that was LoftQ's: PEFT's setting of that name asks for it anew, so `save` says
    it in the metadata alone.
    """
    with safe_open(place / peft.TENSORS, framework="pt") as content:
        text = (content.metadata() or {}).get(_MARK)
    written = None if text is None else parse(text)
    if isinstance(method, Factors) and isinstance(written, Factors) and written.init == "loftq":
        return dataclasses.replace(method, init="loftq")
    return method


def _made(
    model: nn.Module,
    method: Method,
    config: Mapping[str, Any],
    layers: Mapping[str, Mapping[str, str]],
    tensors: Mapping[str, Tensor],
    place: str,
) -> dict[str, Adapter]:
    """The adapters of the layers, of the right shapes and not filled yet."""
    known = linears(model)
    modules = dict(model.named_modules())
    if not layers:
        raise ValueError(f"{place!r} holds no adapter: its file has no tensors of one")
    for path, names in layers.items():
        if path not in known or known[path].kind == "expert":
            kind = f"which is a {type(modules[path]).__name__}" if path in modules else "which this model has not"
            raise ValueError(
                f"{place!r} is for another model: tensor {next(iter(names.values()))!r} belongs to {path}, {kind}"
                f"{nearest(path, known)}"
            )
    shared = _shared(method, [modules[path] for path in layers], tensors, place)
    made: dict[str, Adapter] = {}
    for path, names in layers.items():
        own = of_layer(method, *peft.patterns_of(config, path))
        check_size(own, path, modules[path])
        made[path] = adapter = make(own, modules[path], _dtype(tensors[next(iter(names.values()))]), shared)
        _check(adapter.state_dict(), names, tensors, path, modules[path], place)
    return made


def _check(
    expected: Mapping[str, Tensor],
    names: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    path: str,
    module: nn.Module,
    place: str,
) -> None:
    """Raises ValueError for the first tensor that is absent, too much or of another shape."""
    missing = next((each for each in expected if each not in names), None)
    if missing is not None:
        raise ValueError(f"{place!r} lacks {path}'s {missing}")
    for name, full in names.items():
        if name not in expected:
            raise ValueError(f"{place!r}: tensor {full!r} is no part of what its {peft.CONFIG} speaks of")
        found, wanted = tuple(tensors[full].shape), tuple(expected[name].shape)
        if found != wanted:
            raise ValueError(
                f"{place!r} is for another model: tensor {full!r} is {_size(found)}, and {path}"
                f"{f', a matrix of {_size(shape(module))},' if hasattr(module, 'weight') else ''} needs {_size(wanted)}"
            )


def _size(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def _shared(method: Method, layers: list[Any], tensors: Mapping[str, Tensor], place: str) -> Projections | None:
    """VeRA's A and B: those of the file, or drawn anew where it leaves them out."""
    if not isinstance(method, VeRA):
        return None
    if not set(peft.SHARED.values()) <= set(tensors):
        return projections(method, layers)
    a, b = (tensors[name] for name in peft.SHARED.values())
    columns, rows = max(shape(layer)[1] for layer in layers), max(shape(layer)[0] for layer in layers)
    for name, each, fits in (
        ("vera_A", a, a.ndim == 2 and a.shape[0] == method.rank and a.shape[1] >= columns),
        ("vera_B", b, b.ndim == 2 and b.shape[1] == method.rank and b.shape[0] >= rows),
    ):
        if not fits:
            raise ValueError(
                f"{place!r} is for another model: {name} is {_size(tuple(each.shape))}, and rank {method.rank} "
                f"with matrices up to {rows}x{columns} does not fit it"
            )
    return Projections(a, b).on(layers[0].weight.device)


def _copied(
    model: nn.Module,
    copies: Mapping[str, Mapping[str, str]],
    tensors: Mapping[str, Tensor],
    layers: list[str],
    place: str,
) -> dict[str, Adapter]:
    """The modules that the adapter has a copy of, filled."""
    modules = dict(model.named_modules())
    for path, names in copies.items():
        if path not in modules:
            raise ValueError(f"{place!r} is for another model: {next(iter(names.values()))!r} is no module's of it")
    check_copies(modules, list(copies), layers)
    made: dict[str, Adapter] = {}
    for path, names in copies.items():
        copied = copy.deepcopy(modules[path])
        _check(copied.state_dict(), names, tensors, path, copied, place)
        copied.load_state_dict({name: tensors[full] for name, full in names.items()})
        made[path] = Whole(copied)
    return made


@torch.no_grad()
def _fill(adapter: Adapter, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    adapter.load_state_dict({name: tensors[full] for name, full in names.items()})


def _dtype(tensor: Tensor) -> torch.dtype:
    """That of a loaded adapter's parameters: in 16 bits they would not move by small updates."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
