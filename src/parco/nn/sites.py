"""Sites: where the matrices of a model are.

A site is named as the model names it: `model.layers.0.self_attn.q_proj`, and
`model.layers.0.mlp.experts.gate_up_proj[3]` for the matrix of expert 3 inside a 3-D parameter. Models are recognised by
structure, so Transformers is never imported here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

from parco.nn.experts import EXPERT_PARAMETERS, expert_bias, expert_matrix, expert_shape, is_experts
from parco.nn.linear import Embedding, Linear, kind_of
from parco.nn.stored import StoredWeight

Kind = Literal["linear", "conv1d", "embedding", "expert"]

_EXPERT_NAME = re.compile(r"(?P<module>.*)\.(?P<parameter>gate_up_proj|down_proj)\[(?P<index>\d+)\]")


@dataclass(frozen=True)
class Site:
    """One matrix: its name, the module that owns it, what kind that is, and (N, K) as in y = x Wᵀ."""

    name: str
    module: torch.nn.Module
    kind: Kind
    shape: tuple[int, int]

    @property
    def expert(self) -> tuple[str, int]:
        """Parameter name and number of an expert's matrix."""
        found = _EXPERT_NAME.fullmatch(self.name)
        assert found is not None, f"{self.name} names no expert"
        return found["parameter"], int(found["index"])


def linears(model: torch.nn.Module) -> dict[str, Site]:
    """Every matrix of `model` that multiplies activations, by name and in the model's order: linear layers, GPT-2's
    Conv1D, parco's own Linear, and each expert of a mixture. Embeddings are not among them; an output head is.
    """
    found: dict[str, Site] = {}
    for name, module in model.named_modules():
        if is_experts(module):
            for parameter in EXPERT_PARAMETERS:
                stack = getattr(module, parameter)
                for index in range(len(stack)):
                    found[f"{name}.{parameter}[{index}]"] = _expert_site(f"{name}.{parameter}[{index}]", module)
        elif (kind := _kind(module)) in ("linear", "conv1d"):
            found[name] = Site(name, module, kind, _shape(module, kind))
    return found


def site(model: torch.nn.Module, name: str) -> Site:
    """The site called `name`, embeddings included. Raises ValueError where the model has no such matrix."""
    expert = _EXPERT_NAME.fullmatch(name)
    path = expert["module"] if expert else name
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{type(model).__name__} has no module {path!r}") from None
    if expert:
        if not is_experts(module):
            raise ValueError(
                f"{path!r} is a {type(module).__name__}, which holds no experts that can be stored one by one"
            )
        count = len(getattr(module, expert["parameter"]))
        if int(expert["index"]) >= count:
            raise ValueError(f"{name!r}: {path} has the experts 0 to {count - 1}")
        return _expert_site(name, module)
    kind = _kind(module)
    if kind is None:
        raise ValueError(
            f"{name!r} is a {type(module).__name__}; only linear layers, Conv1D, embeddings and experts hold a matrix"
        )
    return Site(name, module, kind, _shape(module, kind))


def matrix(model: torch.nn.Module, name: str) -> torch.Tensor:
    """The matrix of the site `name`, [N, K] as in y = x Wᵀ: a detached view where the model stores it so or
    transposed, a copy of an expert's gate and up where their rows alternate, and decoded fp32 where it is a stored
    Weight already.
    """
    where = site(model, name)
    held = expert_matrix(where.module, *where.expert) if where.kind == "expert" else where.module.weight
    if isinstance(held, StoredWeight):
        return held.dense().detach()
    assert isinstance(held, torch.Tensor)
    return held.detach().t() if where.kind == "conv1d" else held.detach()


def bias(model: torch.nn.Module, name: str) -> torch.Tensor | None:
    """The bias [N] of the site `name`, or None where it has none."""
    where = site(model, name)
    if where.kind == "expert":
        held = expert_bias(where.module, *where.expert)
    else:
        held = None if where.kind == "embedding" else where.module.bias
    return held.detach() if isinstance(held, torch.Tensor) else None


def _expert_site(name: str, module: torch.nn.Module) -> Site:
    found = _EXPERT_NAME.fullmatch(name)
    assert found is not None
    return Site(name, module, "expert", expert_shape(module, found["parameter"]))


def _kind(module: torch.nn.Module) -> Kind | None:
    """What sort of site `module` is. A subclass with a forward of its own is none, since replacing it would lose that
    forward.
    """
    if isinstance(module, Linear):
        return "linear"
    if isinstance(module, Embedding):
        return "embedding"
    if isinstance(module, torch.nn.Linear):
        # torch.nn.MultiheadAttention reads this subclass's weight and bypasses its forward.
        bypassed = isinstance(module, torch.nn.modules.linear.NonDynamicallyQuantizableLinear)
        return "linear" if kind_of(module).forward is torch.nn.Linear.forward and not bypassed else None
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return "conv1d"
    if isinstance(module, torch.nn.Embedding):
        plain = type(module).forward is torch.nn.Embedding.forward or embedding_scale(module) is not None
        return "embedding" if plain and module.max_norm is None else None
    return None


def embedding_scale(module: torch.nn.Module) -> float | None:
    """The factor of a scaled embedding (Gemma's `scalar_embed_scale`), None for a plain one. It is a Python number, so
    that it is known on the meta device too.
    """
    scale = module.scale if isinstance(module, Embedding) else getattr(module, "scalar_embed_scale", None)
    return float(scale) if isinstance(scale, int | float) else None


def _shape(module: torch.nn.Module, kind: Kind) -> tuple[int, int]:
    weight = module.weight
    assert isinstance(weight, torch.Tensor | StoredWeight)
    first, second = weight.shape
    return (second, first) if kind == "conv1d" else (first, second)
