"""Delayed scaling: an fp8 scale taken from the amax of earlier steps, so that casting needs one pass instead of two.

The rule is TransformerEngine's (most recent amax of 1,024, `max`, margin 0). It differs in what it stores: `scale`
here is what codes are multiplied with, amax * 2**margin / greatest, the reciprocal of TransformerEngine's.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from parco.formats import Float


class DelayedScaling(NamedTuple):
    """The state of one tensor's delayed scale: plain tensors, to be saved with a checkpoint (resuming without them
    breaks).

    `scale` is fp32 [1, 1] and goes to `encode(..., scale=)` of a format such as "fp8_e4m3:tensor:delayed"; `history`
    is fp32 [length], the newest amax first.
    """

    scale: Tensor
    history: Tensor

    @classmethod
    def start(cls, length: int = 1024, device: torch.device | None = None) -> Self:
        """Scale 1 and an empty history of `length`. ValueError if length < 1."""
        if length < 1:
            raise ValueError(f"length={length}: a history has at least one entry")
        return cls(torch.ones(1, 1, device=device), torch.zeros(length, device=device))

    def update(self, amax: Tensor, element: Float, margin: int = 0) -> Self:
        """The state after a step whose tensor had `amax` (a scalar): the scale that the next step uses.

        The scale is computed before the history rolls, and stays where the history's amax is 0, infinite or NaN.
        """
        history = self.history.clone()
        history[0] = amax
        largest = history.amax()
        fresh = largest * 2.0**margin / element.max
        usable = (largest > 0) & torch.isfinite(largest)
        scale = torch.where(usable, fresh, self.scale)
        history = history.roll(1)
        history[0] = 0
        return type(self)(scale, history)
