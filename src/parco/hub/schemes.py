"""What compressed-tensors says of a matrix in config.json, and the Format that it is.

    {"config_groups": {"group_0": {"targets": ["Linear"], "format": "pack-quantized", "input_activations": null,
        "weights": {"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 128}}},
     "ignore": ["lm_head"], "quant_method": "compressed-tensors", "quantization_status": "compressed"}

| format | weights | parco |
| --- | --- | --- |
| pack-quantized | int, 2 to 8 bits; tensor, channel, group | `int4:128`, `int4:128:asym`, `int8:row` |
| int-quantized | int; tensor, channel, group | the same, usually under `activations(int8)` |
| float-quantized | float, 8 bits; tensor, channel, group, block | `fp8_e4m3:tensor`, `:row`, `:1x128`, `:128x128` |
| nvfp4-pack-quantized | float, 4 bits; tensor_group of 16 | `nvfp4` |
| mxfp4-pack-quantized | float, 4 bits; group of 32 | `mxfp4` |
| mxfp6-pack-quantized | float, 6 bits; group of 32 | `mxfp6_e2m3` |
| mxfp8-quantized | float, 8 bits; group of 32, scales in bytes | `mxfp8_e4m3` |

A target is a module's name, `re:` and a pattern that its name begins with, or its class. Names come before patterns,
patterns before classes. Source: the package's `quantization/quant_args.py` and `utils/match.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from parco.formats import (
    DTYPE_NAMES,
    E2M1,
    E2M3,
    E4M3,
    ROW,
    TENSOR,
    Block,
    Float,
    Format,
    Integer,
    ScaleAbsmax,
    ScaleE4M3,
    ScaleE8M0,
    ScaleRange,
    group,
    integer,
)
from parco.products import Activations, Product

INT_PACKED, INT, FLOAT, NVFP4 = "pack-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized"
MX = {E2M1: "mxfp4-pack-quantized", E2M3: "mxfp6-pack-quantized", E4M3: "mxfp8-quantized"}
FORMATS = (INT_PACKED, INT, FLOAT, "naive-quantized", NVFP4, *MX.values())

_FLOATS = {4: E2M1, 6: E2M3, 8: E4M3}
_INT8_PER_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


@dataclass(frozen=True)
class Scheme:
    """One of the `config_groups`: for which modules it is, how their matrices are written, and how their inputs and
    outputs are rounded.
    """

    targets: tuple[str, ...]
    weights: Mapping[str, Any]
    activations: Mapping[str, Any] | None
    format: str
    outputs: Mapping[str, Any] | None = None


def schemes(settings: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """The schemes of a `quantization_config`. ValueError for what parco cannot read, or would compute wrongly."""
    for key in ("transform_config", "sparsity_config"):
        found = settings.get(key)
        if found and not (isinstance(found, dict) and cast(dict[str, Any], found).get("format", "") == "dense"):
            raise ValueError(f"its {key} is {found!r}, which parco does not compute: give a model without it")
    if settings.get("quantization_status", "compressed") != "compressed":
        raise ValueError(
            f"its quantization_status is {settings['quantization_status']!r}: only what is compressed holds codes"
        )
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError("its quantization_config has no config_groups")
    return tuple(_scheme(name, found, settings) for name, found in groups.items())


def _scheme(name: str, found: Any, settings: Mapping[str, Any]) -> Scheme:
    if not isinstance(found, dict) or not isinstance(found.get("targets"), list):
        raise ValueError(f"config_groups[{name!r}] is {found!r}: an object with targets and weights is needed")
    written = found.get("format") or settings.get("format")
    if not isinstance(found.get("weights"), dict):
        raise ValueError(f"config_groups[{name!r}] has no weights: parco reads models whose matrices are quantized")
    if written not in FORMATS:
        raise ValueError(f"config_groups[{name!r}] has the format {written!r}: known are {', '.join(FORMATS)}")
    inputs, outputs = found.get("input_activations"), found.get("output_activations")
    for key, rounded in (("input_activations", inputs), ("output_activations", outputs)):
        if not isinstance(rounded, dict | None):
            raise ValueError(f"config_groups[{name!r}] has {key} that are {rounded!r}: an object or null is needed")
    return Scheme(names(found["targets"]), found["weights"], inputs, written, outputs)


def names(targets: Any) -> tuple[str, ...]:
    """The targets as texts; ValueError for what is no list, and for a pattern that is none."""
    if not isinstance(targets, list):
        raise ValueError(f"its targets are {targets!r}: a list of names, patterns and classes is needed")
    found = tuple(map(str, cast(list[Any], targets)))
    for target in found:
        try:
            re.compile(target.removeprefix("re:"))
        except re.error as error:
            raise ValueError(f"its target {target!r} is no pattern: {error}") from error
    return found


def choose(found: Iterable[Scheme], name: str, module: nn.Module) -> Scheme | None:
    """The scheme that the package applies to the module called `name`, or None."""
    targets = {target: scheme for scheme in found for target in scheme.targets}
    for target in sorted(targets, key=lambda target: ("re:" in target, target)):
        if matches_name(name, target):
            return targets[target]
    return next((targets[target] for target in sorted(targets) if _is_a(module, target)), None)


def matches_name(name: str, target: str) -> bool:
    """Whether `target` is the name, or a pattern that the name begins with."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return name == target


def is_ignored(ignored: Iterable[str], name: str, module: nn.Module) -> bool:
    """Whether the module is left alone."""
    return any(matches_name(name, target) or _is_a(module, target) for target in ignored)


def _is_a(module: nn.Module, target: str) -> bool:
    return any(kind.__name__ == target for kind in type(module).__mro__)


def format_of(weights: Mapping[str, Any], scale_dtype: torch.dtype) -> Format:
    """The Format of a scheme's weights whose scales are stored in `scale_dtype`. ValueError, beginning with the key,
    where parco has none.
    """
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    symmetric = weights.get("symmetric", True)
    block = _block(weights)
    if type(bits) is not int:
        raise ValueError(f"weight_scale: num_bits={bits!r} is no whole number")
    if kind == "float" and symmetric and bits in _FLOATS:
        element = _FLOATS[bits]
        if weights.get("strategy") == "tensor_group":
            return Format(element, block, ScaleE4M3())
        if scale_dtype == torch.uint8:
            return Format(element, block, ScaleE8M0())
        if bits == 8:
            return Format(element, block, ScaleAbsmax(_stored(scale_dtype)))
    if kind == "int" and bits in range(2, 9):
        scale = ScaleAbsmax(_stored(scale_dtype)) if symmetric else ScaleRange(_stored(scale_dtype))
        return Format(integer(bits), block, scale)
    raise ValueError(f"weight_scale: parco has no format of num_bits={bits}, type={kind!r}, symmetric={symmetric}")


def _block(weights: Mapping[str, Any]) -> Block:
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    structure = weights.get("block_structure")
    if strategy == "block" and isinstance(structure, list) and [type(size) for size in structure] == [int, int]:
        return Block(*structure)
    if strategy in ("group", "tensor_group") and isinstance(size, int):
        return group(size)
    blocks = {"tensor": TENSOR, "channel": ROW}
    if not isinstance(strategy, str) or strategy not in blocks:
        raise ValueError(
            f"weight_scale: strategy={strategy!r} with group_size={size!r} and block_structure={structure!r} is none"
            " that parco knows"
        )
    return blocks[strategy]


def _stored(dtype: torch.dtype) -> torch.dtype:
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"weight_scale: scales are {dtype}; they must be {', '.join(map(str, DTYPE_NAMES))}")
    return dtype


def product_of(activations: Mapping[str, Any] | None) -> Product | str | None:
    """The Product that rounds inputs so; None for inputs that are not rounded; else words for how they are there."""
    if activations is None:
        return None
    if all(activations.get(key, default) == default for key, default in _INT8_PER_TOKEN.items()):
        return Activations("int8")
    return rounding(activations)


def rounding(activations: Mapping[str, Any]) -> str:
    """How inputs or outputs are rounded, in words."""
    kind = "fp" if activations.get("type") == "float" else "int"
    when = "per" if activations.get("dynamic") else "by scales that were found beforehand, per"
    return f"{kind}{activations.get('num_bits', 8)}, {when} {activations.get('strategy') or 'tensor'}"


def scheme_of(form: Format, product: Product) -> Scheme:
    """How compressed-tensors writes a matrix of this Format that is multiplied by `product`; without targets.
    ValueError where it cannot.
    """
    weights = _weights(form)
    if weights is None:
        raise ValueError("compressed-tensors has no such format")
    activations = _INT8_PER_TOKEN if isinstance(product, Activations) else None
    match form.scale, form.element:
        case ScaleE4M3(), _:
            written = NVFP4
        case ScaleE8M0(), Float() as element:
            written = MX[element]
        case _, Float():
            written = FLOAT
        case _:
            written = INT_PACKED if activations is None else INT
    return Scheme((), weights, activations, written)


def _weights(form: Format) -> dict[str, Any] | None:
    element, block = form.element, form.block
    if isinstance(element, Integer) and isinstance(form.scale, ScaleAbsmax | ScaleRange):
        asymmetric = isinstance(form.scale, ScaleRange)
        found = {"num_bits": element.bits, "type": "int", "symmetric": not asymmetric}
        is_known = block in (ROW, TENSOR) or block.is_group
        return found | _strategy(block) if is_known and not (asymmetric and block == TENSOR) else None
    if element == E4M3 and isinstance(form.scale, ScaleAbsmax):
        is_known = block in (ROW, TENSOR) or block.is_group or (block.rows and block.columns)
        return {"num_bits": 8, "type": "float", "symmetric": True} | _strategy(block) if is_known else None
    if isinstance(form.scale, ScaleE4M3) and block == group(16):
        return {
            "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16,
            "scale_dtype": "torch.float8_e4m3fn",
        }  # fmt: skip
    if isinstance(form.scale, ScaleE8M0) and element in MX:
        found = {"num_bits": form.bits, "type": "float", "symmetric": True, "scale_dtype": "torch.uint8"}
        return found | _strategy(block)
    return None


def _strategy(block: Block) -> dict[str, Any]:
    if block == TENSOR:
        return {"strategy": "tensor"}
    if block == ROW:
        return {"strategy": "channel"}
    if block.is_group:
        return {"strategy": "group", "group_size": block.columns}
    return {"strategy": "block", "block_structure": [block.rows, block.columns]}
