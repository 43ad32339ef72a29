"""What parco knows of architectures: the repeated blocks of a model, and which of its matrices belong together.

Matrices that read the same input (q, k and v; gate and up; the experts of one block) form a group: the fit makes one
choice for them. Roles are told by the names of layers, which the families of Llama, Mistral, Qwen, GPT-2, GPT-NeoX,
Gemma, Phi and Mixtral settle among a few; a layer whose name says nothing is a group of its own. Nothing is registered
per architecture, so an unknown model with repeated blocks works too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from parco.nn.replace import replace_
from parco.nn.sites import Site, bias, linears, matrix, site
from parco.nn.ties import tied

__all__ = [
    "Group",
    "GroupKind",
    "bias",
    "blocks",
    "embedding_name",
    "groups",
    "head_name",
    "linears",
    "matrix",
    "replace_",
    "site",
    "tied",
]

GroupKind = Literal[
    "embed", "head", "qkv", "out", "gate_up", "up", "down", "experts_gate_up", "experts_down", "router", "other"
]

_TOGETHER: dict[GroupKind, tuple[frozenset[str], ...]] = {
    "qkv": (
        frozenset({"q_proj", "k_proj", "v_proj"}),
        frozenset({"query", "key", "value"}),
        frozenset({"wq", "wk", "wv"}),
        frozenset({"q", "k", "v"}),
    ),
    "gate_up": (frozenset({"gate_proj", "up_proj"}), frozenset({"w1", "w3"}), frozenset({"wi_0", "wi_1"})),
}
"""Names that form one group where one module holds them."""

_ALONE: dict[str, GroupKind] = {
    **dict.fromkeys(("qkv_proj", "query_key_value", "Wqkv", "c_attn", "qkv", "W_pack"), "qkv"),
    **dict.fromkeys(("o_proj", "out_proj", "wo", "o", "dense"), "out"),
    "gate_up_proj": "gate_up",
    **dict.fromkeys(("fc1", "c_fc", "dense_h_to_4h", "fc_in", "up_proj", "linear1"), "up"),
    **dict.fromkeys(("down_proj", "fc2", "dense_4h_to_h", "fc_out", "w2", "linear2"), "down"),
    **dict.fromkeys(("gate", "router", "shared_expert_gate"), "router"),
}
"""Kind of a group of one, by the layer's own name. `c_proj` is told by its parent."""


@dataclass(frozen=True)
class Group:
    """Matrices that get one choice. `members` are site names; `block` is the number of the repeated block that holds
    them, None outside; `kind` says what they do. A "router" decides which expert runs: it is small, and wrong choices
    cost far more than its bytes, so callers leave it dense.
    """

    name: str
    members: tuple[str, ...]
    block: int | None
    kind: GroupKind

    @property
    def reads_one_input(self) -> bool:
        """Whether several members multiply the same input."""
        return self.kind in ("qkv", "gate_up") and len(self.members) > 1


def blocks(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The repeated blocks of `model` in order, with their names: the children of the outermost ModuleList that holds
    the most numbers in matrices. Empty where no ModuleList holds any.
    """
    sizes: dict[str, int] = {}
    lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    for name, found in linears(model).items():
        for path in outermost:
            if name.startswith(f"{path}."):
                sizes[path] = sizes.get(path, 0) + found.shape[0] * found.shape[1]
    if not sizes:
        return []
    path = max(sizes, key=lambda candidate: sizes[candidate])
    return [(f"{path}.{index}", block) for index, block in model.get_submodule(path).named_children()]


def embedding_name(model: torch.nn.Module) -> str | None:
    """Name of the token embedding, or None: what `get_input_embeddings` returns, else the first embedding of a plain
    model.
    """
    found = _accessor(model, "get_input_embeddings")
    for name, module in model.named_modules():
        if module is found or (found is None and type(module).__name__ == "Embedding"):
            return name
    return None


def head_name(model: torch.nn.Module) -> str | None:
    """Name of the output head, or None: what `get_output_embeddings` returns, else a plain model's linear layer outside
    the blocks that is tied to the embedding or has one row per token.
    """
    found = _accessor(model, "get_output_embeddings")
    if found is not None:
        return next((name for name, module in model.named_modules() if module is found), None)
    embedding = embedding_name(model)
    if embedding is None or hasattr(model, "get_output_embeddings"):
        return None
    vocabulary = site(model, embedding).shape[0]
    inside = tuple(f"{name}." for name, _ in blocks(model))
    outside = [
        name for name, found in linears(model).items() if not name.startswith(inside) and found.shape[0] == vocabulary
    ]
    return outside[-1] if outside else None


def groups(model: torch.nn.Module) -> list[Group]:
    """Every matrix of `model` in exactly one group: the embedding, the blocks' groups in order, other layers, the head.

    A tied embedding and head are one group, "embed", with both names. Position embeddings, which no product reads, and
    embeddings of a class that cannot be replaced are in none.
    """
    embedding, head = embedding_name(model), head_name(model)
    shared = tied(model, embedding) if embedding else ()
    sites = {name: found for name, found in linears(model).items() if name not in shared and name != head}
    found: list[Group] = []
    if embedding and _replaceable(model, embedding):
        found.append(Group("embed", shared, None, "embed"))
    paths = [name for name, _ in blocks(model)]
    for index, path in enumerate(paths):
        inside = {name: sites.pop(name) for name in list(sites) if name.startswith(f"{path}.")}
        found += _block_groups(inside, index)
    found += [Group(name, (name,), None, "other") for name in sites]
    if head and head not in shared:
        found.append(Group("head", (head,), None, "head"))
    return found


def _block_groups(sites: dict[str, Site], block: int) -> list[Group]:
    """Groups of one block, in the order of their first members."""
    members: dict[tuple[str, GroupKind], list[str]] = {}
    siblings: dict[str, set[str]] = {}
    for name in sites:
        parent, _, leaf = name.rpartition(".")
        siblings.setdefault(parent, set()).add(leaf)
    for name, found in sites.items():
        parent, _, leaf = name.rpartition(".")
        if found.kind == "expert":
            parameter = found.expert[0]
            key: tuple[str, GroupKind] = (
                (f"{parent}.gate_up", "experts_gate_up")
                if parameter == "gate_up_proj"
                else (f"{parent}.down", "experts_down")
            )
        else:
            kind = _kind_together(leaf, siblings[parent])
            key = (f"{parent}.{kind}", kind) if kind else (name, _kind_alone(parent, leaf))
        members.setdefault(key, []).append(name)
    return [Group(name, tuple(names), block, kind) for (name, kind), names in members.items()]


def _kind_together(leaf: str, siblings: set[str]) -> GroupKind | None:
    for kind, sets in _TOGETHER.items():
        if any(leaf in names and names <= siblings for names in sets):
            return kind
    return None


def _kind_alone(parent: str, leaf: str) -> GroupKind:
    if leaf == "c_proj":
        return "out" if "attn" in parent.rpartition(".")[2] else "down"
    return _ALONE.get(leaf, "other")


def _replaceable(model: torch.nn.Module, name: str) -> bool:
    try:
        site(model, name)
    except ValueError:
        return False
    return True


def _accessor(model: torch.nn.Module, name: str) -> torch.nn.Module | None:
    method = getattr(model, name, None)
    found = method() if callable(method) else None
    return found if isinstance(found, torch.nn.Module) else None
