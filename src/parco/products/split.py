"""Products of bf16 words.

Rows of A and columns of B are first scaled by powers of two to a greatest magnitude in [1/2, 1), so that low words do
not underflow where a multiplier treats subnormal numbers as zero, and unscaled afterwards; both are exact.

The words are multiplied as fp32 tensors that hold bf16 values. That is the same product with the same fp32
accumulation, and it stays exact where torch is told to compute fp32 matrices in tf32 or bf16, since every word fits.
"""

from typing import Any

import torch
from torch import Tensor

from parco.products.how import WORDS, Split


def split_matmul(a: Tensor, b: Tensor, how: Split) -> Tensor:
    """a [..., M, K] @ b [..., K, N] in fp32 from fp32, by the pairs of words of `how`; differentiable by the same
    product.

    A row of `a` or a column of `b` that holds an infinity or a NaN gives NaN.
    """
    return _SplitMatmul.apply(a, b, how)  # pyright: ignore[reportReturnType]


class _SplitMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, how: Split) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.how = how
        return _multiply(a, b, how)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a, b = ctx.saved_tensors
        (grad,) = grad_outputs
        grad_a = split_matmul(grad, b.mT, ctx.how).sum_to_size(a.shape) if ctx.needs_input_grad[0] else None
        grad_b = split_matmul(a.mT, grad, ctx.how).sum_to_size(b.shape) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b, None


def _multiply(a: Tensor, b: Tensor, how: Split) -> Tensor:
    exponent_a, exponent_b = exponents(a, -1), exponents(b, -2)
    words_a, words_b = words(scale(a, -exponent_a)), words(scale(b, -exponent_b))
    (first_i, first_j), *rest = how.pairs
    total = torch.matmul(words_a[first_i], words_b[first_j])
    for i, j in rest:
        total = total + torch.matmul(words_a[i], words_b[j])
    return scale(total, exponent_a + exponent_b)


def exponents(x: Tensor, dim: int) -> Tensor:
    """int32 exponents e along `dim` (kept, of extent 1) for which |x| / 2**e < 1, and >= 1/2 for the greatest; 0 for
    zeros.
    """
    return torch.frexp(x.abs().amax(dim=dim, keepdim=True)).exponent


def scale(x: Tensor, exponent: Tensor) -> Tensor:
    """fp32 `x` * 2**exponent, rounded once, for exponents in which no power of two of fp32 may exist (torch.ldexp's
    limit).
    """
    power = ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
    return (x.to(torch.float64) * power).to(torch.float32)


def words(x: Tensor) -> list[Tensor]:
    """fp32 `x` as a sum of three fp32 tensors that hold bf16 numbers, greatest first; exact away from underflow."""
    parts: list[Tensor] = []
    rest = x
    for _ in range(WORDS):
        part = rest.to(torch.bfloat16).to(torch.float32)
        parts.append(part)
        rest = rest - part
    return parts
