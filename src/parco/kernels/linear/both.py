"""linear_both: the product of two matrices that are both stored as 4-bit floats in groups along k (nvfp4, mxfp4 …).

    y[m, n] = Σ over groups g of (Σ over k in g of u[m, k]·v[n, k]) · ((s[m, g]·unit) · (t[n, g]·unit))

u and v are the integers that fp4's numbers are in units of 1/2, s and t the scales. The inner sums are exact in int32,
the outer ones fp32 in ascending order. Decoding both and multiplying in fp32 takes sixteen multiply-adds for a group
where this takes four of bytes and three operations more.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from parco import _C, machine
from parco.formats import Format
from parco.kernels import table
from parco.kernels.cast import decode_tensors
from parco.kernels.cast.scaling import scale_numbers
from parco.kernels.library import LIBRARY, TYPES
from parco.kernels.linear.storage import NIBBLE, check_tensors, settle, storage

NAME = "linear_both"


class BothCall(NamedTuple):
    """One call: `rows` of `x_format` against `outputs` of `format`, by `columns`, into `dtype`."""

    device: str
    isa: str
    dtype: torch.dtype
    rows: int
    outputs: int
    columns: int
    x_format: str
    format: str

    def __str__(self) -> str:
        return (
            f"{self.rows} rows of {self.x_format} x {self.format} {self.outputs}x{self.columns}, as {self.dtype}, "
            f"{torch.get_num_threads()} threads"
        )


def takes_both(x_format: Format, format: Format) -> bool:
    """Whether `linear_both` multiplies matrices of these formats: 4-bit floats, both in groups of as many columns."""
    group = x_format.block.columns
    fits = all(not each.is_dense and each.element == x_format.element for each in (x_format, format))
    return (
        fits
        and storage(str(x_format)).table is not None
        and x_format.bits == NIBBLE
        and group is not None
        and x_format.block.rows == 1
        and format.block.columns == group
        and storage(str(format)).refusal is None
    )


def describe(
    x_codes: Tensor,
    x_scale: Tensor,
    x_global_scale: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    x_format: str,
    format: str,
    columns: int,
    dtype: torch.dtype,
) -> BothCall:
    """The table's key of a call."""
    sizes = x_codes.shape[0], codes.shape[0], columns
    return BothCall(x_codes.device.type, machine.isa(), dtype, *sizes, x_format, format)


def check(
    x_codes: Tensor,
    x_scale: Tensor,
    x_global_scale: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    x_format: str,
    format: str,
    columns: int,
    dtype: torch.dtype,
) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit together."""
    if dtype not in TYPES:
        raise TypeError(f"{NAME}: dtype is {dtype}; float32, bfloat16 or float16 is needed")
    for name, each in (("x_codes", x_codes), ("codes", codes)):
        if each.ndim != 2:
            raise ValueError(f"{NAME}: {name} has the shape {tuple(each.shape)}; codes by rows, a matrix, are needed")
    if not takes_both(Format.parse(x_format), Format.parse(format)):
        raise ValueError(
            f"{NAME}: x_format={x_format!r} by format={format!r}; x must be a 4-bit float in groups of one row, W "
            "the same element in groups of as many columns, such as nvfp4 by nvfp4"
        )
    given = {"codes": x_codes, "scale": x_scale, "zero": None, "global_scale": x_global_scale}
    check_tensors(f"{NAME}, of x", x_format, columns, x_codes.shape[0], given)
    given = {"codes": codes, "scale": scale, "zero": None, "global_scale": global_scale}
    check_tensors(NAME, format, columns, codes.shape[0], given)


def _tensors(codes: Tensor, scale: Tensor, global_scale: Tensor | None) -> dict[str, Tensor]:
    own = {"codes": codes, "scale": scale}
    return own if global_scale is None else {**own, "global_scale": global_scale}


def _reference(
    x_codes: Tensor,
    x_scale: Tensor,
    x_global_scale: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    x_format: str,
    format: str,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """decode(x) @ decode(W).T in fp32, rounded once: [M, N]."""
    x = decode_tensors(x_format, (x_codes.shape[0], columns), _tensors(x_codes, x_scale, x_global_scale))
    w = decode_tensors(format, (codes.shape[0], columns), _tensors(codes, scale, global_scale))
    return (x @ w.T).to(dtype)


def _compiled(kernel: Callable[..., None]) -> Callable[..., Tensor]:
    def run(
        x_codes: Tensor,
        x_scale: Tensor,
        x_global_scale: Tensor | None,
        codes: Tensor,
        scale: Tensor,
        global_scale: Tensor | None,
        x_format: str,
        format: str,
        columns: int,
        dtype: torch.dtype,
    ) -> Tensor:
        stored, (rows, outputs) = storage(format), (x_codes.shape[0], codes.shape[0])
        x_codes, codes, scale = x_codes.contiguous(), codes.contiguous(), scale.contiguous()
        numbers = scale_numbers(Format.parse(x_format), _tensors(x_codes, x_scale, x_global_scale))
        assert numbers is not None
        numbers = (numbers * stored.unit).contiguous()
        y = x_codes.new_empty((rows, outputs), dtype=dtype)
        kernel(
            settle(stored, rows, outputs, columns, dtype, scale, None, False, int8=True),
            x_codes.data_ptr(),
            numbers.data_ptr(),
            codes.data_ptr(),
            scale.data_ptr(),
            0 if global_scale is None else global_scale.data_ptr(),
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y

    return run


def _refuses(call: BothCall) -> str | None:
    return None if call.rows and call.outputs else "there are no rows or no outputs"


table.register(
    table.Operation(
        NAME,
        describe,
        (
            table.Kernel("both-linear-avx512_vbmi", "avx512_vbmi", _compiled(_C.int_both_avx512_vbmi), _refuses),
            table.Kernel("both-linear-avx512", "avx512", _compiled(_C.int_both_avx512), _refuses),
            table.Kernel("both-linear-torch", table.TORCH, _reference),
        ),
    )
)
LIBRARY.define(
    f"{NAME}(Tensor x_codes, Tensor x_scale, Tensor? x_global_scale, Tensor codes, Tensor scale, Tensor? global_scale,"
    " str x_format, str format, int columns, ScalarType dtype) -> Tensor"
)


def _fake(
    x_codes: Tensor,
    x_scale: Tensor,
    x_global_scale: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    x_format: str,
    format: str,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    return x_codes.new_empty((x_codes.shape[0], codes.shape[0]), dtype=dtype)


table.implement(NAME, check, _fake)


def linear_both(
    x_codes: Tensor,
    x_scale: Tensor,
    x_global_scale: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    global_scale: Tensor | None,
    x_format: str,
    format: str,
    columns: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """y [M, N] = x @ W.T in `dtype` (fp32, bf16 or fp16), summed in fp32 and rounded once, of x [M, K] stored in
    `x_format` and W [N, K] in `format`: nvfp4, mxfp4 or fp4_e2m1, x in groups of one row and W in groups or blocks of
    as many columns (`takes_both`); `columns` is K.

    The tensors are those of `Format.tensors`, by rows. Not differentiable. Raises ValueError or TypeError naming the
    argument.
    """
    given = (x_codes, x_scale, x_global_scale, codes, scale, global_scale, x_format, format, columns, dtype)
    return torch.ops.parco.linear_both.default(*given)
