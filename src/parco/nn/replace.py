"""Swaps one matrix of a model for a stored Weight, in place."""

from __future__ import annotations

import torch

from parco.formats import DTYPE_NAMES
from parco.nn.experts import (
    EXPERT_PARAMETERS,
    Experts,
    activation,
    expert_matrix,
    expert_shape,
    gate_before_up,
    gating,
)
from parco.nn.linear import Embedding, Linear, carries_adapters
from parco.nn.sites import Site, embedding_scale, site
from parco.nn.stored import StoredWeight
from parco.nn.ties import rename, tied
from parco.weights import Dense


def replace_(model: torch.nn.Module, name: str, stored: StoredWeight) -> None:
    """Puts `stored` where the matrix of the site `name` was; biases and embedding scales stay.

    `stored` takes over the compute dtype of the matrix that it replaces. Where several modules share the matrix (tied
    embeddings) all of them get the same `stored`, so it remains one. The first expert replaced in a block turns that
    block's experts into `parco.nn.Experts`, the others staying dense until their turn. Raises ValueError for an unknown
    name, a shape that differs or a layer with adapters.
    """
    where = site(model, name)
    if tuple(stored.shape) != where.shape:
        raise ValueError(f"replace_: {name} is {where.shape[0]}x{where.shape[1]}; the weight given is {stored.spec}")
    if where.kind == "expert":
        _replace_expert(model, where, stored)
        return
    if carries_adapters(where.module):
        raise ValueError(f"replace_: {name} carries adapters; merge or remove them first")
    stored.dtype = _compute_dtype(where.module.weight)
    names = tied(model, name)
    for member in names:
        _set(model, member, _successor(site(model, member), stored))
    if len(names) > 1:
        rename(model, names, stored)


def _successor(where: Site, stored: StoredWeight) -> torch.nn.Module:
    """The parco module that does what the module of this site did."""
    if where.kind == "embedding":
        return Embedding(stored, getattr(where.module, "padding_idx", None), embedding_scale(where.module))
    bias = where.module.bias
    assert bias is None or isinstance(bias, torch.nn.Parameter)
    return Linear(stored, bias)


def _replace_expert(model: torch.nn.Module, where: Site, stored: StoredWeight) -> None:
    parameter, index = where.expert
    experts = where.module
    if not isinstance(experts, Experts):
        experts = _separate(experts)
        _set(model, where.name.rpartition(".")[0], experts)
    stored.dtype = _compute_dtype(getattr(experts, parameter)[index])
    getattr(experts, parameter)[index] = stored


def _separate(module: torch.nn.Module) -> Experts:
    """The same experts with every matrix on its own. Copies slice by slice, so that each is freed when it is
    replaced.
    """
    stacks: list[list[StoredWeight]] = []
    biases: list[torch.nn.Parameter | None] = []
    how, act_fn = gating(module), activation(module)
    assert how is not None
    for parameter in EXPERT_PARAMETERS:
        stack: torch.Tensor = getattr(module, parameter)
        spec = Dense(expert_shape(module, parameter), _dense_name(stack.dtype))
        matrices = (_dense(module, parameter, index) for index in range(len(stack)))
        stacks.append([StoredWeight(spec, spec.encode(matrix), stack.dtype) for matrix in matrices])
        bias: torch.Tensor | None = getattr(module, f"{parameter}_bias", None)
        if bias is not None:
            ordered = gate_before_up(module, parameter, bias.detach(), 1)
            bias = torch.nn.Parameter(ordered, requires_grad=bias.requires_grad)
        biases.append(bias)
    for parameter in EXPERT_PARAMETERS:
        delattr(module, parameter)
    gate_up, down = stacks
    return Experts(gate_up, down, act_fn, how, biases)


def _dense(module: torch.nn.Module, parameter: str, index: int) -> torch.Tensor:
    held = expert_matrix(module, parameter, index)
    assert isinstance(held, torch.Tensor)
    return held


def _dense_name(dtype: torch.dtype) -> str:
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"experts are stored in {dtype}; parco stores dense matrices as fp32, bf16 or fp16")
    return DTYPE_NAMES[dtype]


def _compute_dtype(weight: torch.Tensor | torch.nn.Module) -> torch.dtype:
    assert isinstance(weight, torch.Tensor | StoredWeight)
    return weight.dtype


def _set(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    module.train(getattr(owner, leaf).training)
    owner.add_module(leaf, module)
