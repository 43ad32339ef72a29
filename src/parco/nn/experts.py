"""The experts of one mixture-of-experts block, each matrix a stored Weight.

Transformers keeps the experts of a block as two 3-D parameters, `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I].
Here every expert's matrix is a Weight of its own: an expert is then quantized or factored like any other matrix, and
only those to which tokens are routed are read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from parco.nn.stored import StoredWeight


class Experts(torch.nn.Module):
    """Gated experts: down(act(gate) · up), with gate and up the two halves of one product.

    gate_up_proj: one weight [2I, H] per expert; down_proj: one [H, I] per expert; act_fn: the activation.
    """

    gate_up_proj: torch.nn.ModuleList
    down_proj: torch.nn.ModuleList

    def __init__(
        self, gate_up_proj: Sequence[StoredWeight], down_proj: Sequence[StoredWeight], act_fn: torch.nn.Module
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

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [T, H], top_k_index [T, k] (expert numbers), top_k_weights [T, k]; returns [T, H].

        Tokens are sorted by expert so that each expert multiplies once. An index of `num_experts` or more means "held
        elsewhere" and adds nothing, as in Transformers.
        """
        tokens, choices = top_k_index.shape
        order = torch.argsort(top_k_index.reshape(-1), stable=True)
        counts: list[int] = torch.bincount(top_k_index.reshape(-1), minlength=self.num_experts).tolist()
        sorted_states = hidden_states[order // choices]
        outputs: list[torch.Tensor] = []
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

    def _expert(self, index: int, states: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj[index](states).chunk(2, dim=-1)
        return self.down_proj[index](self.act_fn(gate) * up)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}"
