"""cross_entropy_: the cross entropy of rows of logits with their labels; it leaves its derivative in their place.

In one pass over memory: a row of a vocabulary's logits stays in the second level of cache while its largest, the sum of
powers and the derivative are found. It has no derivative of its own, because it is the derivative that it makes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parco import _C, machine
from parco.kernels import table
from parco.kernels.library import LIBRARY, TYPES, check_float


class CrossEntropyCall(NamedTuple):
    """One call of cross_entropy_ on `rows` by `columns` logits of `dtype`."""

    device: str
    isa: str
    dtype: torch.dtype
    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns} of {self.dtype}"


def describe(logits: Tensor, *_: Any) -> CrossEntropyCall:
    """The table's key of a call."""
    return CrossEntropyCall(logits.device.type, machine.isa(), logits.dtype, *logits.shape)


def check(
    logits: Tensor,
    labels: Tensor,
    factors: Tensor | None,
    softcap: float,
    smoothing: float,
    gradient: bool,
    rounded: torch.dtype,
) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit together."""
    check_float("cross_entropy_", "logits", logits)
    if logits.ndim != 2 or logits.shape[1] == 0 or not logits.is_contiguous():
        raise ValueError(
            f"cross_entropy_: logits have the shape {tuple(logits.shape)} and strides {logits.stride()}; a contiguous "
            "matrix of at least one column is needed"
        )
    for name, tensor, dtype in (("labels", labels, torch.int64), ("factors", factors, torch.float32)):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"cross_entropy_: {name} are {tensor.dtype}; {dtype} is needed")
        if tensor.shape != logits.shape[:1]:
            raise ValueError(
                f"cross_entropy_: {name} have the shape {tuple(tensor.shape)}; ({logits.shape[0]},), one per row of "
                "logits, is needed"
            )
    if not softcap >= 0:
        raise ValueError(f"cross_entropy_: softcap={softcap}; a positive number, or 0 for none, is needed")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"cross_entropy_: smoothing={smoothing}; a share, 0 to 1, is needed")
    if rounded not in TYPES or (rounded != logits.dtype != torch.float32):
        raise TypeError(f"cross_entropy_: rounded={rounded}; {logits.dtype}, which logits are, is needed")


def reference(
    logits: Tensor,
    labels: Tensor,
    factors: Tensor | None,
    softcap: float,
    smoothing: float,
    gradient: bool,
    rounded: torch.dtype,
) -> Tensor:
    """In fp32."""
    columns = logits.shape[1]
    valid = (labels >= 0) & (labels < columns)
    target = labels.clamp(0, columns - 1).unsqueeze(1)
    z = logits.float()
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    log_p = z.log_softmax(1)
    losses = (smoothing - 1) * log_p.gather(1, target).squeeze(1)
    if smoothing:
        losses = losses - smoothing * log_p.mean(1)
    if gradient:
        grad = log_p.exp() - smoothing / columns
        grad.scatter_add_(1, target, torch.full_like(grad[:, :1], smoothing - 1))
        if softcap:
            grad *= 1 - (z / softcap).square()
        if factors is not None:
            grad *= factors.unsqueeze(1)
        logits.copy_(torch.where(valid.unsqueeze(1), grad, 0.0).to(rounded))
    return torch.where(valid, losses, 0.0)


def _compiled(function: Callable[..., None]) -> Callable[..., Tensor]:
    def run(
        logits: Tensor,
        labels: Tensor,
        factors: Tensor | None,
        softcap: float,
        smoothing: float,
        gradient: bool,
        rounded: torch.dtype,
    ) -> Tensor:
        labels = labels.contiguous()
        factors = None if factors is None else factors.contiguous()
        losses = torch.empty(logits.shape[0], dtype=torch.float32)
        function(
            logits.data_ptr(),
            labels.data_ptr(),
            0 if factors is None else factors.data_ptr(),
            losses.data_ptr(),
            *logits.shape,
            softcap,
            smoothing,
            gradient,
            TYPES[logits.dtype],
            TYPES[rounded],
            torch.get_num_threads(),
        )
        return losses

    return run


def _refuses(call: CrossEntropyCall) -> str | None:
    return None if call.rows else "there are no rows"


table.register(
    table.Operation(
        "cross_entropy_",
        describe,
        (
            table.Kernel("cross-entropy-avx512", "avx512", _compiled(_C.cross_entropy_avx512), _refuses),
            table.Kernel("cross-entropy-avx2", "avx2", _compiled(_C.cross_entropy_avx2), _refuses),
            table.Kernel("cross-entropy-generic", "generic", _compiled(_C.cross_entropy_generic), _refuses),
            table.Kernel("cross-entropy-torch", table.TORCH, reference),
        ),
    )
)

LIBRARY.define(
    "cross_entropy_(Tensor(a!) logits, Tensor labels, Tensor? factors, float softcap, float smoothing, bool gradient, "
    "ScalarType rounded) -> Tensor"
)


def _fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=torch.float32)


table.implement("cross_entropy_", check, _fake)


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    factors: Tensor | None = None,
    softcap: float = 0.0,
    smoothing: float = 0.0,
    gradient: bool = True,
    rounded: torch.dtype | None = None,
) -> Tensor:
    """The cross entropy [T], fp32, of logits [T, V] (fp32, bf16 or fp16; contiguous) with labels [T], int64.

    With `gradient` the logits are overwritten by the derivative, times `factors` [T] fp32 where given, in their own
    dtype and rounded to what `rounded` can write. Where `softcap` is not 0, logits z count as softcap · tanh(z /
    softcap) (arXiv 2408.00118). `smoothing` spreads that share of the target over all columns (arXiv 1512.00567). A row
    whose label is no column has no loss and no gradient. Computed in fp32, sums over a row in fp64. Raises ValueError
    or TypeError naming the argument.
    """
    rounded = logits.dtype if rounded is None else rounded
    return torch.ops.parco.cross_entropy_.default(logits, labels, factors, softcap, smoothing, gradient, rounded)
