"""Experts of mixtures in other libraries' files: Transformers keeps those of a block as two stacks of matrices,
and these write stacks too, with their scales beside them (gpt-oss's MXFP4), or every expert as linear layers of its
own, gate and up apart (all others). parco has a matrix of both for each expert, the rows of the gate first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from parco.formats import DTYPE_NAMES, ROW, TENSOR
from parco.hub.names import resolve
from parco.nn import Site
from parco.nn.experts import EXPERT_PARAMETERS, expert_shape, gate_before_up, is_experts
from parco.weights import Dense, Quantized, Weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STACK = re.compile(rf"(.+)\.({'|'.join(EXPERT_PARAMETERS)})_(\w+)")
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")
_HALVES = {
    "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0),
    "w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0),
}  # fmt: skip
"""Of the layers that make an expert, by their names in Qwen's, DeepSeek's and Mixtral's files: of which matrix they
are, and which half."""
_RENAMED = {"block_sparse_moe": "mlp"}
"""A block's name in files -> in Transformers' modules."""


def of_stack(name: str, parts: frozenset[str]) -> tuple[str, str] | None:
    """(parameter, part) where `name` is a tensor that belongs to a stack of matrices."""
    found = _STACK.fullmatch(name)
    return (f"{found[1]}.{found[2]}", found[3]) if found is not None and found[3] in parts else None


def one_by_one(parameter: str, parts: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The name and the tensors of every matrix of the stack `parameter`. ValueError, beginning with the part, where
    they are of other numbers of matrices.
    """
    counts = {part: tensor.shape[0] if tensor.ndim else 0 for part, tensor in parts.items()}
    for part, count in counts.items():
        if count != next(iter(counts.values())):
            raise ValueError(f"{part}: it is of {count} experts, and another tensor of {next(iter(counts.values()))}")
    for index in range(next(iter(counts.values()))):
        yield f"{parameter}[{index}]", {part: tensor[index] for part, tensor in parts.items()}


class Half:
    """A linear layer in a file that is an expert's down, or half of its gate and up, in a model that has stacks:
    `matrix` is the name of the whole, and `place` says which half; `site` is the layer as it would be.
    """

    def __init__(self, experts: str, module: nn.Module, index: str, leaf: str) -> None:
        parameter, self.place = _HALVES[leaf]
        rows, columns = expert_shape(module, parameter)
        self.matrix = f"{experts}.{parameter}[{index}]"
        self.of = 2 if parameter == "gate_up_proj" else 1
        shape = rows // self.of, columns
        layer = nn.Linear(columns, shape[0], bias=False, device="meta", dtype=getattr(module, parameter).dtype)
        self.site = Site(self.matrix, layer, "linear", shape)


def half(model: PreTrainedModel, name: str) -> Half | None:
    """What the layer `name` of a file is in the mixtures of `model`; None where it is none of their experts' layers."""
    found = _EXPERT.fullmatch(name)
    if found is None or found[3] not in _HALVES:
        return None
    block, _, last = found[1].rpartition(".")
    for path in (found[1], *(f"{block.removesuffix(old)}{new}.{last}" for old, new in _RENAMED.items())):
        here = resolve(model, path)
        module = None if here is None else model.get_submodule(here)
        if module is not None and is_experts(module) and int(found[2]) < len(getattr(module, EXPERT_PARAMETERS[0])):
            return Half(path, module, found[2], found[3])
    return None


Stored = tuple[Weight, tuple[Tensor, ...]]
"""A matrix: how it is stored, and its tensors."""


def joined(gate: Stored, up: Stored) -> Stored:
    """One matrix of both, one above the other. ValueError, saying what differs."""
    (spec, upper), (other, lower) = (_by_row(*half) for half in (gate, up))
    shape = (2 * spec.shape[0], spec.shape[1])
    if isinstance(spec, Quantized) and spec == other:
        whole: Weight = Quantized(spec.format, shape)
    elif isinstance(spec, Dense) and spec == other:
        whole = Dense(shape, spec.format)
    else:
        raise ValueError(f"it is {other}, and the other half {spec}; parco has one matrix of both")
    tensors: list[Tensor] = []
    for (name, wanted), first, second in zip(whole.tensors().items(), upper, lower, strict=True):
        if (first.shape[0] + second.shape[0], *first.shape[1:]) == tuple(wanted.shape):
            tensors.append(torch.cat([first, second]))
        elif torch.equal(first, second):  # one for the whole matrix
            tensors.append(first)
        else:
            raise ValueError(f"its {name} is another than that of the other half, and parco has one matrix of both")
    return whole, tuple(tensors)


def _by_row(spec: Weight, tensors: tuple[Tensor, ...]) -> Stored:
    """The same numbers with a scale for each row where they have one for all."""
    if not isinstance(spec, Quantized) or spec.format.block != TENSOR or len(tensors) != 2:
        return spec, tensors
    codes, scale = tensors
    whole = Quantized(replace(spec.format, block=ROW), spec.shape)
    return whole, (codes, scale.expand(whole.tensors()["scale"].shape).contiguous())


def dense(matrix: Tensor, where: Site) -> Stored:
    """A matrix of which only numbers are known, in the dtype of the model's."""
    dtype = cast(Tensor, where.module.weight).dtype
    spec = Dense(where.shape, DTYPE_NAMES[dtype])
    return spec, spec.encode(matrix.to(dtype))


def order_biases(model: PreTrainedModel, matrices: Mapping[str, Weight], tensors: dict[str, Tensor]) -> None:
    """Puts the biases of stacks that become single matrices into those matrices' order of rows."""
    for path in {name.rpartition(".")[0] for name in matrices if name.endswith("]")}:
        here = resolve(model, path)
        for parameter in EXPERT_PARAMETERS:
            name = f"{path}.{parameter}_bias"
            if here is not None and name in tensors:
                tensors[name] = gate_before_up(model.get_submodule(here), parameter, tensors[name], 1)
