"""Certificates: how wrong a product can be, how wrong it was, and what its bits do not depend on.

The bound is componentwise: |C - AB| <= relative * |A||B| + tail, entry by entry. With u the unit roundoff of the
accumulator and gamma(n) = n*u / (1 - n*u), a sum of k products in any order obeys gamma(k) |A||B| (Higham, Accuracy
and Stability of Numerical Algorithms, section 3.1). A split adds the products of words that it leaves out.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from parco.kernels.cast import random_bits
from parco.products.how import WORDS, Activations, Native, Product, Split, parse
from parco.products.matmul import matmul
from parco.products.split import exponents

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
INPUT_ROUNDOFF = {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-8}
"""What torch may round fp32 matrices to before multiplying them, by torch.get_float32_matmul_precision()."""

WORD_RATIO = 2.0**-8
"""Each bf16 word is at most this much of the number that is left of the one before."""

TINY = 2.0**-126
"""The least normal number of fp32."""

FLUSH = 2.0**-122
"""Bound on what one of the k terms loses when words and products below 2**-126 are flushed to zero, the operands
being below 1: 2 * 2**-125 from the words of both and 9 * 2**-126 from at most nine products.
"""


@dataclass(frozen=True)
class Certificate:
    """What is known of one product.

    `relative` bounds |C - AB| / (|A||B|) beforehand, underflow and the rounding to int8 aside; `measured` is the
    greatest such ratio over `samples` entries that were recomputed exactly; `used` is the greatest fraction of the
    whole bound (both included) that an error took, so the bound held where it is at most 1. `invariant_to` says what
    the bits of the result do not depend on.
    """

    how: Product
    shape: tuple[int, int, int]
    relative: float
    measured: float
    used: float
    samples: int
    invariant_to: frozenset[str]

    def __str__(self) -> str:
        rows, inner, columns = self.shape
        kept = ", ".join(sorted(self.invariant_to))
        return (
            f"{self.how} {rows}x{inner}x{columns}: at most {self.relative:.1e} of |A||B|, measured {self.measured:.1e} "
            f"on {self.samples} entries; same bits for any {kept}"
        )


def certificate(
    a: Tensor,
    b: Tensor,
    how: Product | str = Native(),  # noqa: B008
    *,
    result: Tensor | None = None,
    samples: int = 64,
    seed: int = 0,
) -> Certificate:
    """The certificate of `matmul(a, b, how)` for a [M, K] and b [K, N], both fp32 or both fp64.

    `result` is the product if it has been computed already. `samples` entries, drawn under `seed`, are recomputed
    without error. Raises ValueError for other shapes and for no samples, TypeError for other dtypes (16-bit
    accumulation is the library's choice: no bound is known).
    """
    how = parse(how)
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"a is {tuple(a.shape)}, b is {tuple(b.shape)}: a certificate needs [M, K] and [K, N]")
    if a.dtype not in UNIT_ROUNDOFF or a.dtype != b.dtype:
        raise TypeError(f"a is {a.dtype}, b is {b.dtype}: a certificate needs both in float32 or both in float64")
    if samples < 1 or a.shape[0] * b.shape[1] == 0:
        raise ValueError(f"samples={samples}, result {a.shape[0]}x{b.shape[1]}: at least one entry must be sampled")
    result = matmul(a, b, how) if result is None else result
    bits = random_bits(seed, range(2), samples).tolist()
    rows = [bit % a.shape[0] for bit in bits[0]]
    columns = [bit % b.shape[1] for bit in bits[1]]
    relative, tails = relative_bound(a.shape[1], a.dtype, how), _tails(a, b, how, rows, columns)
    ratios, fractions = [0.0], [0.0]
    for row, column, tail in zip(rows, columns, tails, strict=True):
        exact, magnitude = _exact_entry(a[row], b[:, column])
        error = abs(float(result[row, column]) - exact)
        allowed = relative * magnitude + tail
        ratios.append(error / magnitude if magnitude else math.inf if error else 0.0)
        fractions.append(error / allowed if allowed else math.inf if error else 0.0)
    shape = (a.shape[0], a.shape[1], b.shape[1])
    return Certificate(how, shape, relative, max(ratios), max(fractions), samples, frozenset({"run"}))


def relative_bound(inner: int, dtype: torch.dtype, how: Product) -> float:
    """The factor of |A||B| that bounds the error of a product with `inner` terms per entry, underflow and the rounding
    to int8 aside; inf if none does.
    """
    unit = UNIT_ROUNDOFF[dtype]
    if isinstance(how, Native | Activations):
        rounded = INPUT_ROUNDOFF[torch.get_float32_matmul_precision()] if dtype == torch.float32 else 0.0
        inputs = (1 + rounded) ** 2
        return (inputs - 1) + inputs * _gamma(inner, unit)
    kept = left_out = 0.0
    for i in range(WORDS):
        for j in range(WORDS):
            size = _word_size(i) * _word_size(j)
            if (i, j) in how.pairs:
                kept += size
            else:
                left_out += size
    return left_out + kept * _gamma(inner + len(how.pairs) - 1, unit)


def _word_size(index: int) -> float:
    """Greatest |word| / |x|: the first word may have been rounded up."""
    return 1 + WORD_RATIO if index == 0 else WORD_RATIO**index


def _gamma(terms: int, unit: float) -> float:
    return terms * unit / (1 - terms * unit) if terms * unit < 1 else math.inf


def _tails(a: Tensor, b: Tensor, how: Product, rows: list[int], columns: list[int]) -> list[float]:
    """What underflow may add to the error of each sampled entry."""
    inner = a.shape[1]
    if isinstance(how, Activations):
        # Half a step of its row's scale for each number, roundings of up to 127 steps, saturation where the scale is
        # subnormal; on what this adds to |A| the product errs as on the rest.
        steps = (a.double().abs().amax(1) / 127 * (0.5 + 2.0**-15) + 2.0**-140).tolist()
        sizes = b.abs().sum(0, dtype=torch.float64).tolist()
        grown = 1 + relative_bound(inner, a.dtype, how)
        return [grown * steps[i] * sizes[j] + inner * TINY for i, j in zip(rows, columns, strict=True)]
    if isinstance(how, Split):
        scale_a, scale_b = exponents(a, -1)[:, 0].tolist(), exponents(b, -2)[0].tolist()
        return [inner * FLUSH * 2.0 ** (scale_a[i] + scale_b[j]) for i, j in zip(rows, columns, strict=True)]
    return [inner * torch.finfo(a.dtype).smallest_normal] * len(rows)


def _exact_entry(x: Tensor, y: Tensor) -> tuple[float, float]:
    """x . y and |x| . |y| without error (each rounded once to fp64), for vectors whose products neither over- nor
    underflow.

    Each product is split into its rounded value and the rest (Dekker's two-product); fsum adds without rounding in
    between.
    """
    x64, y64 = x.detach().to("cpu", torch.float64), y.detach().to("cpu", torch.float64)
    product = x64 * y64
    high_x, low_x = _halves(x64)
    high_y, low_y = _halves(y64)
    rest = ((high_x * high_y - product) + high_x * low_y + low_x * high_y) + low_x * low_y
    exact = math.fsum(product.tolist() + rest.tolist())
    return exact, math.fsum(product.abs().tolist())


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as a sum of two numbers of at most 26 bits (Veltkamp)."""
    shifted = x * 134217729.0
    high = shifted - (shifted - x)
    return high, x - high
