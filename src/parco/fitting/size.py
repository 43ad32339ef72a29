"""What a model takes on the disk: the bytes of its safetensors, headers counted.

A safetensors file is the tensors' data after a header of JSON that names each: about a hundred bytes a tensor, which in
a model of a few million parameters is a thousandth of the file. A plan must keep to its size with them. The offsets in
a header are counted at ten digits each, so that the bytes of a matrix do not depend on what stands before it; what is
said here is at least the file, and at most a few bytes a tensor more.

Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from parco.fitting.methods import Method
from parco.nn.blocks import Group, groups, matrix, tied
from parco.nn.saved import HINT, clashing_names, describe, tensors_to_save
from parco.weights import Weight, shared_tensors

_DTYPES = {  # the longest name stands for those not listed
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
LARGE = 300_000_000
"""Parameters above which every pass over the model costs minutes: fewer windows, plans and rounds, no healing unless
steps are asked for, no uniform alternatives, no second stream of the original's states."""

_ENVELOPE = len('{"__metadata__":{"format":"pt"}}') + 8 + 8
"""What is not any tensor's: the header's braces, its length, and spaces up to a multiple of 8."""


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the model as it is stored: parameters, scales and buffers, tied ones once."""
    content = tensors_to_save(model)
    content.pop(HINT, None)
    return _fixed() + sum(_entry(name, tensor.shape, tensor.dtype) for name, tensor in content.items())


def checkpoint_bytes(model: nn.Module) -> int:
    """Bytes of the model as a bf16 checkpoint, however it is stored: two for every number, tied matrices once."""
    description = describe(model)
    stacks: dict[str, list[tuple[int, ...]]] = {}
    for name, spec in description.weights.items():
        stacks.setdefault(next(iter(clashing_names({name: ""}))), []).append(spec.shape)
    total = _fixed()
    for name, shapes in stacks.items():
        total += _entry(name, (len(shapes), *shapes[0]) if len(shapes) > 1 else shapes[0], torch.bfloat16)
    inside = tuple(f"{path}." for path in (*stacks, *(clashing_names(dict.fromkeys(description.tied, "")))))
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for name, tensor in tensors_to_save(model).items():
        if name != HINT and name not in stacks and name not in buffers and not name.startswith(inside):
            total += _entry(name, tensor.shape, torch.bfloat16)
    return total


def planned_bytes(model: nn.Module, methods: Mapping[str, str]) -> int:
    """Bytes that the model, not converted yet, will take with these methods of its groups."""
    changed = [group for group in groups(model) if methods.get(group.name, "keep") != "keep"]
    return stored_bytes(model) + sum(
        group_bytes(model, group, methods[group.name]) - group_bytes(model, group, "keep") for group in changed
    )


def group_bytes(model: nn.Module, group: Group, method: str) -> int:
    """Bytes of a group's matrices by a method, or as they are for "keep"."""
    members = owners(model, group)
    if method == "keep":
        found = {name: model.get_parameter(name) for name in clashing_names(dict.fromkeys(members, ""))}
        return sum(_entry(name, tensor.shape, tensor.dtype) for name, tensor in found.items())
    return _weights_bytes(specs_of(model, group, method))


def method_for(group: Group, text: str) -> Method:
    """The method that `text` names, for this group: what members share needs several that read one input."""
    method = Method.parse(text)
    return method if group.reads_one_input else method.alone()


def specs_of(model: nn.Module, group: Group, text: str) -> dict[str, Weight]:
    """What the members that hold a matrix of their own become by a method."""
    members = owners(model, group)
    return dict(
        zip(members, method_for(group, text).specs([shape_of(model, member) for member in members]), strict=True)
    )


def owners(model: nn.Module, group: Group) -> list[str]:
    """Members that hold a matrix of their own: of tied members the first."""
    held: list[str] = []
    for member in group.members:
        if not any(other in held for other in same(model, member)):
            held.append(member)
    return held


def same(model: nn.Module, member: str) -> tuple[str, ...]:
    """The members that share one matrix with `member`, itself among them."""
    return (member,) if member.endswith("]") else tied(model, member)


def shape_of(model: nn.Module, member: str) -> tuple[int, int]:
    """(N, K) of a member's matrix."""
    rows, columns = matrix(model, member).shape
    return rows, columns


def _weights_bytes(specs: Mapping[str, Weight]) -> int:
    """A group's stored matrices by the names of their modules: their tensors, those that members share with the first
    one, and the text under the clashing names.
    """
    total = 0
    for index, (member, spec) in enumerate(specs.items()):
        path = member.replace("[", ".").removesuffix("]") if member.endswith("]") else f"{member}.weight"
        elsewhere = shared_tensors(spec) if index else set[str]()
        for name, tensor in spec.tensors().items():
            total += 0 if name in elsewhere else _entry(f"{path}.{name}", tensor.shape, tensor.dtype)
    texts = clashing_names({member: str(spec) for member, spec in specs.items()})
    return total + sum(_entry(name, (len(text.encode()),), torch.uint8) for name, text in texts.items())


def _fixed() -> int:
    """What every file has; the hint that converted models carry is counted for all."""
    return _ENVELOPE + _entry(HINT, (1,), torch.uint8)


def _entry(name: str, shape: Iterable[int], dtype: torch.dtype) -> int:
    """Bytes of one tensor and of its line in the header."""
    sizes = tuple(shape)
    text, shape_text, offsets = _DTYPES.get(dtype, "F8_E4M3FN"), ",".join(map(str, sizes)), f"{10 * '0'},{10 * '0'}"
    line = f'"{name}":{{"dtype":"{text}","shape":[{shape_text}],"data_offsets":[{offsets}]}},'
    return len(line.encode()) + math.prod(sizes) * dtype.itemsize
