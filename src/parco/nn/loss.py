"""LinearCrossEntropy: an output head and its loss in one module, without the logits ever being whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from parco.kernels.loss import Reduction, linear_cross_entropy


class LinearCrossEntropy(nn.Module):
    """Cross entropy of `linear(x, weight, bias)` with labels; `parco.kernels.loss.linear_cross_entropy` says how.

    With `in_features` and `out_features` it holds weight [V, K] (and bias [V] with `bias=True`), initialised as
    `nn.Linear`'s; without them it is given them: `loss(x, labels, head.weight)`.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int | None = None,
        out_features: int | None = None,
        bias: bool = False,
        *,
        ignore_index: int = -100,
        softcap: float | None = None,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Raises ValueError where one of the sizes is given without the other, or a bias without them."""
        super().__init__()
        if (in_features is None) != (out_features is None) or (bias and in_features is None):
            raise ValueError(
                f"LinearCrossEntropy: in_features={in_features}, out_features={out_features}, bias={bias}; both sizes "
                "are needed, or neither and no bias"
            )
        self.ignore_index, self.softcap = ignore_index, softcap
        self.label_smoothing = label_smoothing
        self.reduction: Reduction = reduction
        self.weight = self.bias = None
        if in_features is not None and out_features is not None:
            held = dict(nn.Linear(in_features, out_features, bias, device, dtype).named_parameters())
            self.weight, self.bias = held["weight"], held.get("bias")

    def forward(
        self,
        x: Tensor,
        labels: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        divisor: Tensor | float | None = None,
    ) -> Tensor:
        """x [..., K], labels [...] int64; a scalar, or [...] where `reduction` is "none". Raises ValueError where no
        weight [V, K] is held or given, or both.
        """
        if self.weight is not None and (weight is not None or bias is not None):
            raise ValueError("LinearCrossEntropy: it was given a weight or a bias, and holds one; one is needed")
        if weight is None:
            weight, bias = self.weight, self.bias
        if weight is None:
            raise ValueError("LinearCrossEntropy: it holds no weight and was given none; one is needed")
        return linear_cross_entropy(
            x,
            weight,
            labels,
            bias,
            ignore_index=self.ignore_index,
            softcap=self.softcap,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            divisor=divisor,
        )

    def extra_repr(self) -> str:
        sizes = "" if self.weight is None else f"{self.weight.shape[1]}, {self.weight.shape[0]}, "
        return f"{sizes}bias={self.bias is not None}, reduction={self.reduction!r}"
