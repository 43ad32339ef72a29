"""See the inputs and outputs of the matrices of some groups while a model runs.

Linear layers are seen by forward hooks. The experts of a mixture are slices of 3-D parameters that the model multiplies
inside one module, so while they are observed that module's forward is replaced by a loop over experts that computes
the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from parco.nn.blocks import Group
from parco.nn.experts import Gating, activation, expert_bias, expert_matrix, gating

See = Callable[[str, Tensor, Tensor], None]
"""Called with a member's name, its input [..., K] and its output [..., N]."""


def expert_of(member: str) -> tuple[str, str, int] | None:
    """(module, parameter, expert) of a member such as "mlp.experts.down_proj[3]"; None for a plain layer."""
    if not member.endswith("]"):
        return None
    path, _, index = member[:-1].rpartition("[")
    module, _, parameter = path.rpartition(".")
    return module, parameter, int(index)


def site(group: Group, member: str) -> str:
    """The member whose inputs stand for this one's: a group's layers share their input; experts, and what lies outside
    the blocks, have their own.
    """
    return member if expert_of(member) or group.block is None else group.members[0]


@contextmanager
def observed(model: nn.Module, groups: Iterable[Group], see: See) -> Generator[None]:
    """`see` is told of every product of the groups' members while the context lasts. Embedding lookups are not
    products.
    """
    handles: list[Any] = []
    experts: set[str] = set()
    for group in groups:
        for member in group.members:
            expert = expert_of(member)
            if expert is not None:
                experts.add(expert[0])
            elif not is_lookup(model, member):
                handles.append(model.get_submodule(member).register_forward_hook(_hook(member, see)))
    replaced = [model.get_submodule(name) for name in sorted(experts)]
    for name, module in zip(sorted(experts), replaced, strict=True):
        module.forward = _experts_forward(name, module, see)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in replaced:
            module.__dict__.pop("forward", None)


def is_lookup(model: nn.Module, member: str) -> bool:
    """Whether a member's rows are looked up by index, as an embedding's are."""
    return expert_of(member) is None and hasattr(model.get_submodule(member), "num_embeddings")


def _hook(member: str, see: See) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        see(member, args[0], output)

    return hook


def _experts_forward(name: str, module: Any, see: See) -> Callable[..., Tensor]:
    def multiply(kind: str, index: int, states: Tensor) -> Tensor:
        held, bias = expert_matrix(module, kind, index), expert_bias(module, kind, index)
        out = held(states, bias) if isinstance(held, nn.Module) else nn.functional.linear(states, held, bias)
        see(f"{name}.{kind}[{index}]", states, out)
        return out

    gated = functools.partial(gating(module) or Gating(), activation(module))

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for index in range(module.num_experts):
            token, position = torch.where(top_k_index == index)
            if token.numel() == 0:
                continue
            gate, up = multiply("gate_up_proj", index, hidden_states[token]).chunk(2, dim=-1)
            states = multiply("down_proj", index, gated(gate, up))
            out = out.index_add(0, token, (states * top_k_weights[token, position, None]).to(out.dtype))
        return out

    return forward


class Moments:
    """Sums of x xᵀ (and of x_original x_seenᵀ) and of |x| per site, fp32 products accumulated in fp64, and the greatest
    |x|.
    """

    def __init__(self) -> None:
        self.gram: dict[str, Tensor] = {}
        self.cross: dict[str, Tensor] = {}
        self.magnitude: dict[str, Tensor] = {}
        self.peak: dict[str, Tensor] = {}
        self.count: dict[str, int] = {}

    def add(self, name: str, seen: Tensor, original: Tensor | None = None) -> None:
        """Tokens seen [..., K], and the same tokens in the original model."""
        rows = seen.detach().reshape(-1, seen.shape[-1]).float()
        _accumulate(self.gram, name, rows.T @ rows)
        sizes = rows.abs()
        _accumulate(self.magnitude, name, sizes.sum(0))
        peak = sizes.amax(0)
        self.peak[name] = torch.maximum(self.peak[name], peak) if name in self.peak else peak
        self.count[name] = self.count.get(name, 0) + rows.shape[0]
        if original is not None:
            _accumulate(self.cross, name, original.detach().reshape(rows.shape).float().T @ rows)


def _accumulate(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in sums:
        sums[name].add_(value)
    else:
        sums[name] = value.double()


class Energies:
    """Squared gradients of every member: of each output over the tokens that a backward pass has reached, and of each
    column of the matrix, summed over its rows, window by window (the Fisher information of FWSVD, each window an
    example).
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.fisher: dict[str, Tensor] = {}

    def see(self, member: str, seen: Tensor, output: Tensor) -> None:
        if output.requires_grad:
            inputs = seen.detach()
            output.register_hook(lambda grad: self.add(member, inputs, grad))

    def add(self, member: str, seen: Tensor, grad: Tensor) -> None:
        """Inputs [..., T, K] and gradients of the outputs [..., T, N] of some windows of T tokens."""
        inputs, slope = seen.detach().float(), grad.detach().float()
        _accumulate(self.sums, member, slope.square().flatten(0, -2).sum(0))
        # Σ_n (Σ_t g_tn x_tk)² of a window is xₖᵀ (G Gᵀ) xₖ: no gradient of the matrix is formed.
        columns = (slope @ slope.mT @ inputs).mul_(inputs)
        _accumulate(self.fisher, member, columns.flatten(0, -2).sum(0))

    def mean(self, tokens: int) -> dict[str, Tensor]:
        """[N] float32 per member, and [K] for the columns of its matrix as "fisher/member": sums over all `tokens` of
        the model, so that an expert that few tokens reach weighs little.
        """
        fisher = {f"fisher/{name}": total for name, total in self.fisher.items()}
        return {name: (total / max(tokens, 1)).float() for name, total in (self.sums | fisher).items()}
