"""The experts of one mixture-of-experts block, each matrix a stored Weight, and how Transformers keeps them.

Transformers keeps the experts of a block as two 3-D parameters, `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I];
gpt-oss transposes both, adds biases and lets the rows of gate and up alternate. Here every expert's matrix is a Weight
of its own, the gate's rows before those of up: an expert is then quantized or factored like any other matrix, and only
those to which tokens are routed are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parco.nn.stored import StoredWeight

EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")


class Gating(NamedTuple):
    """How gate and up become one: act(slope·min(gate, limit)) / slope · (up within ±limit, plus `raised`).

    As it stands act(gate)·up. gpt-oss's is `Gating(7.0, 1.702, 1.0)` with a SiLU (OpenAI, arXiv 2508.10925, 2.2).
    """

    limit: float = math.inf
    slope: float = 1.0
    raised: float = 0.0

    def __call__(self, act_fn: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
        if self == Gating():
            return act_fn(gate) * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return act_fn(gate * self.slope) / self.slope * (up + self.raised)


class Experts(torch.nn.Module):
    """Gated experts: down(gating(gate, up)), with gate and up the two halves of one product.

    gate_up_proj: one weight [2I, H] per expert; down_proj: one [H, I] per expert; act_fn: the activation; gating: what
    is done with it. biases: those of gate_up_proj [E, 2I] and of down_proj [E, H], where there are any.
    """

    gate_up_proj: torch.nn.ModuleList
    down_proj: torch.nn.ModuleList
    gate_up_proj_bias: torch.nn.Parameter | None
    down_proj_bias: torch.nn.Parameter | None

    def __init__(
        self,
        gate_up_proj: Sequence[StoredWeight],
        down_proj: Sequence[StoredWeight],
        act_fn: torch.nn.Module,
        gating: Gating = Gating(),  # noqa: B008
        biases: Sequence[torch.nn.Parameter | None] = (None, None),
    ) -> None:
        super().__init__()
        if len(gate_up_proj) != len(down_proj):
            raise ValueError(
                f"Experts: {len(gate_up_proj)} gate_up and {len(down_proj)} down weights; every expert has one of each"
            )
        for index, (first, second) in enumerate(zip(gate_up_proj, down_proj, strict=True)):
            if first.spec.shape[0] != 2 * second.spec.shape[1] or first.spec.shape[1] != second.spec.shape[0]:
                raise ValueError(
                    f"Experts: expert {index} has gate_up {first.spec.shape} and down {second.spec.shape}; "
                    "they must be (2I, H) and (H, I)"
                )
        self.num_experts = len(gate_up_proj)
        self.gate_up_proj = torch.nn.ModuleList(gate_up_proj)
        self.down_proj = torch.nn.ModuleList(down_proj)
        self.act_fn = act_fn
        self.gating = gating
        for name, weights, bias in zip(EXPERT_PARAMETERS, (gate_up_proj, down_proj), biases, strict=True):
            if bias is not None and tuple(bias.shape) != (wanted := (len(weights), weights[0].spec.shape[0])):
                raise ValueError(f"Experts: the bias of {name} is {tuple(bias.shape)}; {wanted} is needed")
            self.register_parameter(f"{name}_bias", bias)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index [T, k] (expert numbers), top_k_weights [T, k]; returns [T, H].

        Tokens are sorted by expert so that each expert multiplies once. An index of `num_experts` or more means "held
        elsewhere" and adds nothing, as in Transformers.
        """
        tokens, choices = top_k_index.shape
        order = torch.argsort(top_k_index.reshape(-1), stable=True)
        counts: list[int] = torch.bincount(top_k_index.reshape(-1), minlength=self.num_experts).tolist()
        sorted_states = hidden_states[order // choices]
        outputs: list[Tensor] = []
        start = 0
        for index, count in enumerate(counts):
            states = sorted_states[start : start + count]
            start += count
            if index >= self.num_experts:
                outputs.append(torch.zeros_like(states))
            elif count:
                outputs.append(self._expert(index, states))
        sorted_outputs = torch.cat(outputs) if outputs else sorted_states
        weighted = sorted_outputs * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        unsorted = weighted[torch.argsort(order)].view(tokens, choices, hidden_states.shape[-1])
        return unsorted.sum(dim=1).to(hidden_states.dtype)

    def _expert(self, index: int, states: Tensor) -> Tensor:
        gate_up = self.gate_up_proj[index](states, expert_bias(self, "gate_up_proj", index))
        states = self.gating(self.act_fn, *gate_up.chunk(2, dim=-1))
        return self.down_proj[index](states, expert_bias(self, "down_proj", index))

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}" + ("" if self.gating == Gating() else f", {self.gating}")


def is_experts(module: Any) -> bool:
    """Whether `module` keeps gated experts in one of the layouts above, and gates as `Gating` can.

    The flags are those that Transformers' `use_experts_implementation` leaves on the module; what else its class does
    with gate and up is tried out.
    """
    if isinstance(module, Experts):
        return True
    held = dict(module.named_parameters(recurse=False))
    if [getattr(module, flag, None) for flag in ("has_gate", "has_post_expert_norm")] != [True, False]:
        return False
    biases = {f"{name}_bias": 2 for name in EXPERT_PARAMETERS} if module.has_bias else {}
    dimensions = {name: parameter.dim() for name, parameter in held.items()}
    return dimensions == {**dict.fromkeys(EXPERT_PARAMETERS, 3), **biases} and gating(module) is not None


def gating(module: Any) -> Gating | None:
    """How these experts gate; None where it is done otherwise than `Gating` can."""
    if isinstance(module, Experts):
        return module.gating
    function: Any = getattr(type(module), "_apply_gate", None)
    if function is None or not isinstance(getattr(module, "act_fn", torch.nn.SiLU()), torch.nn.Module):
        return None
    if function.__name__ == "_default_apply_gate":
        return Gating()
    held = module.__dict__
    limit, slope = (
        next((float(held[name]) for name in names if isinstance(held.get(name), int | float)), plain)
        for names, plain in ((("limit", "swiglu_limit"), math.inf), (("alpha", "swiglu_alpha"), 1.0))
    )
    line = torch.arange(-30, 31, dtype=torch.float32, device="cpu")  # whatever the default is now
    gate, up = (each.flatten() for each in torch.meshgrid(line, line, indexing="ij"))
    both = torch.cat([gate, up]) if module.is_concatenated else torch.stack([gate, up], dim=-1).flatten()
    try:
        wanted = function(module, both)
    except Exception:  # whatever it needs, it is none of ours
        return None
    ways = [Gating(limit, slope, raised) for raised in (0.0, 1.0)]
    return next((way for way in ways if _same(way(activation(module), gate, up), wanted)), None)


def _same(ours: Tensor, theirs: Any) -> bool:
    return isinstance(theirs, Tensor) and theirs.shape == ours.shape and torch.allclose(ours, theirs, 1e-5, 1e-5)


def activation(module: Any) -> torch.nn.Module:
    """The activation of a block of experts; gpt-oss writes its SiLU out."""
    return getattr(module, "act_fn", None) or torch.nn.SiLU()


def expert_shape(module: Any, parameter: str) -> tuple[int, int]:
    """(N, K) of every expert's matrix."""
    first, second = getattr(module, parameter)[0].shape
    return (second, first) if _is_transposed(module) else (first, second)


def expert_matrix(module: Any, parameter: str, index: int) -> Tensor | StoredWeight:
    """The matrix [N, K] of one expert: a stored one, or a detached view of the parameter, or where gate and up
    alternate there a copy.
    """
    held = getattr(module, parameter)[index]
    if isinstance(held, StoredWeight):
        return held
    return gate_before_up(module, parameter, held.detach().t() if _is_transposed(module) else held.detach(), 0)


def expert_bias(module: Any, parameter: str, index: int) -> Tensor | None:
    """The bias [N] of one expert's product, in the order of `expert_matrix`; None where there is none."""
    held: Tensor | None = getattr(module, f"{parameter}_bias", None)
    return None if held is None else gate_before_up(module, parameter, held[index], 0)


def gate_before_up(module: Any, parameter: str, x: Tensor, dim: int) -> Tensor:
    """`x`, whose dimension `dim` is that of the outputs of `parameter` as this module has them: of gate and up with all
    of the gate first.
    """
    if parameter != "gate_up_proj" or getattr(module, "is_concatenated", True):
        return x
    return torch.cat([x.unflatten(dim, (-1, 2)).select(dim + 1, each) for each in (0, 1)], dim)


def _is_transposed(module: Any) -> bool:
    return bool(getattr(module, "is_transposed", False))
