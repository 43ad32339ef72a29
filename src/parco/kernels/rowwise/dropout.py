"""dropout: a share of the numbers is 0 and the rest is divided by what is left (Srivastava et al., JMLR 2014).

Which numbers, Philox says by row, column and a seed, so the mask is never in memory: backward is the same operation on
the gradient, under the same seed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parco import _C, machine
from parco.kernels import table
from parco.kernels.cast.philox import dropout_factors
from parco.kernels.library import LIBRARY, TYPES, check_float, differentiate, undispatched


class DropoutCall(NamedTuple):
    """One call of dropout on `rows` by `columns` numbers of `dtype`."""

    device: str
    isa: str
    dtype: torch.dtype
    rows: int
    columns: int
    p: float

    def __str__(self) -> str:
        return f"{self.p:g} of {self.rows}x{self.columns} of {self.dtype}"


def describe(x: Tensor, seed: Tensor, p: float) -> DropoutCall:
    """The table's key of a call."""
    return DropoutCall(x.device.type, machine.isa(), x.dtype, *_sizes(x), p)


def _sizes(x: Tensor) -> tuple[int, int]:
    columns = x.shape[-1] if x.ndim else 1
    return x.numel() // max(columns, 1), columns


def check(x: Tensor, seed: Tensor, p: float) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit together."""
    check_float("dropout", "x", x)
    if seed.dtype != torch.int64:
        raise TypeError(f"dropout: seed is {seed.dtype}; torch.int64 is needed")
    if seed.numel() != 1:
        raise ValueError(f"dropout: seed has the shape {tuple(seed.shape)}; one number is needed")
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p is {p:g}; a share, 0 to 1, is needed")


def reference(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """In fp32, rounded once."""
    if p == 1 or not x.numel():
        return x.new_zeros(x.shape)
    factors = dropout_factors(seed, *_sizes(x), p, device=x.device).reshape(x.shape)
    return torch.where(factors > 0, x.float() * factors, 0.0).to(x.dtype)


def _compiled(function: Callable[..., None]) -> Callable[..., Tensor]:
    def run(x: Tensor, seed: Tensor, p: float) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        number = int(seed) % (1 << 64)
        function(x.data_ptr(), y.data_ptr(), *_sizes(x), number, p, TYPES[x.dtype], torch.get_num_threads())
        return y

    return run


def _refuses(call: DropoutCall) -> str | None:
    if not (call.rows and call.columns):
        return "there are no numbers"
    return "all is dropped" if call.p == 1 else None


table.register(
    table.Operation(
        "dropout",
        describe,
        (
            table.Kernel("dropout-avx512", "avx512", _compiled(_C.dropout_avx512), _refuses),
            table.Kernel("dropout-avx2", "avx2", _compiled(_C.dropout_avx2), _refuses),
            table.Kernel("dropout-generic", "generic", _compiled(_C.dropout_generic), _refuses),
            table.Kernel("dropout-torch", table.TORCH, reference),
        ),
    )
)

LIBRARY.define("dropout(Tensor x, Tensor seed, float p) -> Tensor")


def _fake(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return x.new_empty(x.shape)


def _needs_grad(x: Tensor, seed: Tensor, p: float) -> bool:
    return x.requires_grad


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Linear in x, so the gradient goes the same way."""
    (seed,) = ctx.saved_tensors
    return torch.ops.parco.dropout.default(grad, seed, ctx.p), None, None


_cpu = table.implement("dropout", check, _fake)
differentiate("dropout", _needs_grad, _setup, _backward)


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x [..., K] with each number 0 with probability p and divided by 1 - p otherwise, in fp32 and rounded once. x is
    fp32, bf16 or fp16, `seed` one int64.

    A number is dropped where its random bits, those of Philox4x32-10 under `seed` for its row (all dimensions but the
    last as one) and column, are below p·2³²: the same for every dtype, layout in memory and number of threads. What is
    dropped is 0, also of infinities and NaNs, where PyTorch's multiplies and gives NaN. Any number of times
    differentiable with respect to x; only the seed is kept for it. Raises ValueError or TypeError naming the argument.
    """
    if undispatched(x, seed):
        return _cpu(x, seed, p)
    return torch.ops.parco.dropout.default(x, seed, p)
