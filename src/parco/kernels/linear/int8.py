"""linear_coded_int8: the product of `linear_coded` with x quantized to int8, one scale for each row, inside the call.

    scale[m] = max |x[m, :]| / 127,   q[m, k] = round(x[m, k] / scale[m]) to nearest even, within ±127
    y[m, n] = (Σ over groups g of (Σ over k in g of q[m, k]·code[n, k]) · s[n, g]) · scale[m] + bias[n]

which is the encoding that `parco.encode(x, "int8:row")` writes; torchao calls the same int8 dynamic activations. The
inner sums are exact (int32, up to 65,536 columns, which longer rows are cut into), the outer ones fp32 in ascending
order, so the same bits come out of every instruction set, batch size and thread count. A code meets one byte of x
where `linear_coded` takes two, or four of fp32.

The derivative is the straight-through one: that of the product with x itself.
"""

from typing import Any

import torch
from torch import Tensor

from parco import _C
from parco.kernels import table
from parco.kernels.activations import NONE
from parco.kernels.cast import decode, encode
from parco.kernels.library import LIBRARY, undispatched
from parco.kernels.linear import coded, reference
from parco.kernels.linear.coded import CodedCall
from parco.kernels.linear.gradient import differentiate_coded
from parco.kernels.linear.launches import Compiled, remembering
from parco.kernels.linear.storage import storage

NAME = "linear_coded_int8"

WORDS_ROWS = 8
"""Rows of x up to which AVX-512 without VNNI multiplies words (`decode_words` of `csrc/linear/int_avx512.h`)."""


def describe(*arguments: Any) -> CodedCall:
    """The table's key of a call."""
    return coded.describe(*arguments)._replace(int8=True)


def check(x: Tensor, *arguments: Any) -> None:
    """As `linear_coded`'s; also ValueError for a format whose numbers are no integers times scales of groups."""
    coded.check(x, *arguments, operation=NAME)
    format = arguments[5]
    if not storage(format).takes_int8:
        raise ValueError(
            f"{NAME}: format={format!r} does not multiply int8: its numbers must be small integers, with scales for "
            "rows, blocks or groups of a multiple of 16 columns"
        )


def rounded_to_int8(x: Tensor) -> Tensor:
    """The numbers, in fp32, that int8 with a scale per row keeps of x [..., K]. A row that holds inf or NaN becomes
    NaN.
    """
    numbers = decode(encode(x, "int8:row"))
    return torch.where(x.isfinite().all(-1, keepdim=True), numbers, float("nan"))


def _reference(
    x: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    bias: Tensor | None,
    format: str,
    columns: int,
    outputs: int = 0,
    activation: str = NONE,
    addend: Tensor | None = None,
) -> Tensor:
    """rounded_to_int8(x) @ decode(...).T + bias in fp32 arithmetic, rounded once to x's dtype: [..., K] -> [..., N]."""
    stored = (codes, scale, zero, global_scale)
    last = (format, columns, outputs, activation, addend)
    return reference.linear_coded(rounded_to_int8(x), *stored, bias, *last).to(x.dtype)


def _bytes_or_words(call: CodedCall) -> str:
    """The element of int_avx512.cpp: bytes where two products of them fit in 16 bits, and rows repay their layout."""
    return "int8" if call.rows > WORDS_ROWS and storage(call.format).format.bits < 8 else coded.words(call)


table.register(
    table.Operation(
        NAME,
        describe,
        (
            table.Kernel(
                "int8-linear-amx", "amx", Compiled(_C.int_amx, int8=True), coded.refuses_tiles, lambda call: "int8"
            ),
            table.Kernel(
                "int8-linear-avx512_vbmi",
                "avx512_vbmi",
                Compiled(_C.int_avx512_vbmi, int8=True),
                coded.refuses_integers,
                lambda call: "int8",
            ),
            table.Kernel(
                "int8-linear-avx512",
                "avx512",
                Compiled(_C.int_avx512, int8=True),
                coded.refuses_integers,
                _bytes_or_words,
            ),
            table.Kernel(
                "int8-linear-avx2", "avx2", Compiled(_C.int_avx2, int8=True), coded.refuses_integers, coded.words
            ),
            table.Kernel(
                "int8-linear-generic",
                "generic",
                Compiled(_C.int_generic, int8=True),
                coded.refuses_integers,
                coded.words,
            ),
            table.Kernel("int8-linear-torch", table.TORCH, _reference),
        ),
    )
)
LIBRARY.define(f"{NAME}{coded.SIGNATURE}")
_cpu = remembering(NAME, describe, check)
table.implement(NAME, check, coded.fake, _cpu)
differentiate_coded(NAME)


def linear_coded_int8(
    x: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    bias: Tensor | None,
    format: str,
    columns: int,
    outputs: int = 0,
    activation: str = NONE,
    addend: Tensor | None = None,
) -> Tensor:
    """y [..., N] = activation(int8(x) [..., K] @ W.T + bias) + addend, in x's dtype (fp32, bf16 or fp16), rounded once.

    int8(x) has a scale for each row of x, absmax / 127. The other arguments are those of `linear_coded`. A row with inf
    or NaN becomes NaN. Differentiable with respect to x, as if x were not rounded, bias and addend. Raises ValueError
    or TypeError naming the argument, ValueError also for a format whose numbers are no small integers.
    """
    arguments = (x, codes, scale, zero, global_scale, bias, format, columns, outputs, activation, addend)
    if undispatched(x, codes, scale, zero, global_scale, bias, addend):
        return _cpu(*arguments)
    return torch.ops.parco.linear_coded_int8.default(*arguments)
