"""PEFT's two files: what `adapter_config.json` says of a method, and under which names tensors are saved.

A bottleneck adapter, for which PEFT has no such type, goes into the same two files under a type of its own,
`PARCO_BOTTLENECK`, which PEFT refuses.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from parco.adapters.layers import Adapter, VectorBased, Whole
from parco.adapters.methods import Bottleneck, DoRA, Factors, LoRA, Method, VeRA, parse
from parco.adapters.targets import by_pattern, ends
from parco.nn.parts import is_conv1d

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
SHARED = {"vera_A": "base_model.vera_A", "vera_B": "base_model.vera_B"}
_BOTTLENECK = "PARCO_BOTTLENECK"

_SUFFIXES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
"""Where PEFT's name of a parameter is not ours."""
_PARAMETERS = {
    **{suffix: name for name, suffix in _SUFFIXES.items()},
    **{name: name for name in ("vera_lambda_b", "vera_lambda_d")},
    **{f"{part}.{kind}": f"{part}.{kind}" for part in ("down", "up") for kind in ("weight", "bias")},
}

_REFUSED = (
    *("lora_bias", "alora_invocation_tokens", "arrow_config", "kasa_config", "use_bdlora", "use_qalora"),
    *("layer_replication", "trainable_token_indices", "target_parameters", "monteclora_config"),
)
"""Settings of PEFT's LoRA that change what is computed in ways that no method here has."""

_BEGUN = ("olora", "corda", "loftq", "lora_ga", "pissa_niter")
"""Initialisations after which the base is another one, which the files do not say."""


def config_of(model: nn.Module, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """What `adapter_config.json` says of these adapters, by the name of their layer."""
    methods = {name: each.method for name, each in adapters.items() if each.method is not None}
    copies = [name for name, each in adapters.items() if isinstance(each, Whole)]
    method = next(iter(methods.values()))
    config: dict[str, Any] = {
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None) or None,
        "bias": "none",
        "fan_in_fan_out": all(is_conv1d(model.get_submodule(name)) for name in methods),
        "inference_mode": True,
        "modules_to_save": _shortest(model, copies) or None,
        "target_modules": _shortest(model, methods),
        "task_type": "CAUSAL_LM" if _generates(model) else None,
    }
    if isinstance(method, Factors):
        ranks = {name: each.rank for name, each in methods.items() if isinstance(each, Factors)}
        alphas = {
            name: each.rank if each.alpha is None else each.alpha
            for name, each in methods.items()
            if isinstance(each, Factors)
        }
        rank, alpha = _usual(ranks.values()), _usual(alphas.values())
        config |= {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {re.escape(name): own for name, own in ranks.items() if own != rank},
            "alpha_pattern": {re.escape(name): own for name, own in alphas.items() if own != alpha},
            "lora_dropout": method.dropout,
            "use_rslora": method.scaling == "rslora",
            "use_dora": isinstance(method, DoRA),
            "init_lora_weights": "pissa" if method.init == "pissa" else True,
        }
    elif isinstance(method, VeRA):
        config |= {
            "peft_type": "VERA",
            "r": method.rank,
            "vera_dropout": method.dropout,
            "d_initial": method.initial,
            "projection_prng_key": method.seed,
            "save_projection": True,
        }
    elif isinstance(method, Bottleneck):
        config |= {"peft_type": _BOTTLENECK, "method": str(method)}
    else:
        raise AssertionError(f"{method}: nothing says how its files are written")
    return dict(sorted(config.items()))


def tensors_of(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """The tensors under the names that PEFT gives them."""
    found: dict[str, Tensor] = {}
    for path, adapter in adapters.items():
        if isinstance(adapter, Whole):
            found |= {f"{PREFIX}{path}.{name}": tensor for name, tensor in adapter.module.state_dict().items()}
            continue
        for name, tensor in adapter.state_dict().items():
            found[f"{PREFIX}{path}.{_SUFFIXES.get(name, name)}"] = tensor
        if isinstance(adapter, VectorBased):
            found |= {SHARED[name]: tensor for name, tensor in adapter.shared.named_buffers()}
    return {name: tensor.detach().contiguous() for name, tensor in sorted(found.items())}


def method_of(config: Mapping[str, Any], where: str) -> Method:
    """The method that an `adapter_config.json` speaks of. Raises ValueError, naming the setting, for one that none
    here is.
    """
    kind = config.get("peft_type")
    if kind not in ("LORA", "VERA", _BOTTLENECK):
        raise ValueError(f"{where}: peft_type is {kind!r}; LORA (with DoRA) and VERA are taken, and {_BOTTLENECK}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{where}: bias is {config['bias']!r}; adapters without trained biases are taken ('none')")
    try:
        if kind == _BOTTLENECK:
            found = parse(str(config.get("method")))
            if not isinstance(found, Bottleneck):
                raise ValueError(f"method is {config.get('method')!r}")
            return found
        if kind == "VERA":
            return VeRA(
                rank=config.get("r", 256),
                dropout=config.get("vera_dropout", 0.0),
                initial=config.get("d_initial", 0.1),
                seed=config.get("projection_prng_key", 0),
            )
        return _factors(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _factors(config: Mapping[str, Any]) -> Factors:
    for name in _REFUSED:
        if config.get(name):
            raise ValueError(f"{name} is {config[name]!r}, which computes in a way not known here")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_BEGUN):
        raise ValueError(
            f"init_lora_weights is {init!r}, after which the base is another one than its checkpoint's; have PEFT save "
            "it as an ordinary LoRA (path_initial_model_for_weight_conversion)"
        )
    kind = DoRA if config.get("use_dora") else LoRA
    return kind(
        rank=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        dropout=config.get("lora_dropout", 0.0),
        scaling="rslora" if config.get("use_rslora") else "lora",
        init="pissa" if init == "pissa" else "default",
    )


def patterns_of(config: Mapping[str, Any], name: str) -> tuple[int | None, float | None]:
    """The rank and the alpha that the patterns give to a layer, None where they say nothing."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    return by_pattern(ranks, name), by_pattern(alphas, name)


def sorted_names(
    tensors: Iterable[str], copies: Iterable[str], where: str
) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    """({layer: {its adapter's parameter: name in the file}}, the same of modules copied whole). Raises ValueError for a
    name that is neither.
    """
    layers: dict[str, dict[str, str]] = {}
    modules: dict[str, dict[str, str]] = {}
    wanted = tuple(copies)
    for full in tensors:
        if full in SHARED.values():
            continue
        name = full.removeprefix(PREFIX)
        suffix = next((each for each in _PARAMETERS if name.endswith(f".{each}")), None)
        copied = _copied(name, wanted)
        if full.startswith(PREFIX) and copied is not None:
            modules.setdefault(copied, {})[name.removeprefix(f"{copied}.")] = full
        elif full.startswith(PREFIX) and suffix is not None:
            layers.setdefault(name.removesuffix(f".{suffix}"), {})[_PARAMETERS[suffix]] = full
        else:
            raise ValueError(f"{where}: tensor {full!r} is no part of an adapter of linear layers that is known here")
    return layers, modules


def _copied(name: str, wanted: tuple[str, ...]) -> str | None:
    """The module copied whole that holds this parameter, at whatever depth: the outermost whose name ends in one of
    `wanted`.
    """
    parts = name.split(".")
    above = (".".join(parts[:count]) for count in range(1, len(parts)))
    return next((path for path in above if any(ends(path, each) for each in wanted)), None)


def _shortest(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Last parts of the names, where these name the same modules and no others; else the names."""
    wanted = set(names)
    leaves = sorted({name.rpartition(".")[2] for name in wanted})
    for chosen in (leaves, sorted(wanted)):
        if {name for name, _ in model.named_modules() if any(ends(name, each) for each in chosen)} == wanted:
            return chosen
    return sorted(wanted)


def _usual(values: Iterable[Any]) -> Any:
    return collections.Counter(values).most_common(1)[0][0]


def _generates(model: Any) -> bool:
    can = getattr(model, "can_generate", None)
    return callable(can) and bool(can()) and not getattr(model.config, "is_encoder_decoder", False)
