"""linear_coded: y = x @ W.T + bias for a matrix W stored as codes and scales, in any format that is not dense.

Where the numbers of the codes are small integers times a power of two (int2 to int8, ternary, fp4, fp6_e2m3), compiled
kernels compute in integers: x becomes 16-bit words under a power-of-two scale per row and block of at most 128 columns,
the products of words and codes are summed exactly in int32, and the blocks are added in fp32 in ascending order. So
every instruction set, batch size and thread count gives the same bits. x loses at most 2⁻¹⁵ of its block's largest
magnitude (bf16, fp16: nearly all values are kept exactly) or 2⁻²⁹ (fp32, which takes two words).

The other elements (fp8, fp6_e3m2, NF4) are widened to fp32 in registers or in the cache, and summed in fp32. On AMX
tiles they become bf16 instead, and so do fp4 and fp6_e2m3 under scales that are small floats themselves.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from parco import _C, machine
from parco.kernels import table
from parco.kernels.activations import NONE
from parco.kernels.library import LIBRARY, check_float, undispatched
from parco.kernels.linear import epilogue, reference
from parco.kernels.linear.gradient import differentiate_coded
from parco.kernels.linear.launches import Compiled, remembering
from parco.kernels.linear.panels import is_packed
from parco.kernels.linear.storage import check_tensors, rows_of, storage

NAME = "linear_coded"

AMX_ROWS = 16
"""Rows of x from which tiles pay: a tile has 16."""


class CodedCall(NamedTuple):
    """One call of linear_coded: `rows` x of `dtype` against `outputs` by `columns` codes of `format`."""

    device: str
    isa: str
    dtype: torch.dtype
    rows: int
    outputs: int
    columns: int
    format: str
    packed: bool = False
    int8: bool = False

    def __str__(self) -> str:
        return (
            f"{self.rows} rows of {self.dtype}{' as int8' if self.int8 else ''} x {self.format} "
            f"{self.outputs}x{self.columns}{' in panels' if self.packed else ''}, {torch.get_num_threads()} threads"
            f"{', digits written as bits first' if storage(self.format).rewrites(self.packed) else ''}"
        )


def describe(
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
) -> CodedCall:
    """The table's key of a call."""
    rows = x.numel() // columns if columns else 0
    shape = (rows_of(codes, outputs), columns)
    return CodedCall(x.device.type, machine.isa(), x.dtype, rows, *shape, format, is_packed(codes))


def check(
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
    operation: str = NAME,
) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit together."""
    check_float(operation, "x", x)
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(f"{operation}: x has the shape {tuple(x.shape)}; its last dimension must be columns={columns}")
    tensors = {"codes": codes, "scale": scale, "zero": zero, "global_scale": global_scale}
    check_tensors(operation, format, columns, outputs, tensors)
    if bias is not None:
        check_float(operation, "bias", bias)
        if tuple(bias.shape) != (rows_of(codes, outputs),):
            raise ValueError(
                f"{operation}: bias has the shape {tuple(bias.shape)}; [{rows_of(codes, outputs)}] is needed"
            )
    epilogue.check(operation, x, rows_of(codes, outputs), activation, addend)


def _refuses(call: CodedCall) -> str | None:
    if call.rows == 0 or call.outputs == 0:
        return "there are no rows or no outputs"
    return storage(call.format).refusal


def refuses_integers(call: CodedCall) -> str | None:
    """Why kernels that compute in integers do not run a call, or None."""
    if not storage(call.format).integers:
        return f"the numbers of {call.format} are no small integers times a power of two"
    return _refuses(call)


def refuses_tiles(call: CodedCall) -> str | None:
    """As `refuses_integers`, of those on tiles."""
    if call.rows < AMX_ROWS:
        return f"{call.rows} rows do not fill a tile; it starts at {AMX_ROWS}"
    return refuses_integers(call)


def _refuses_bf16_tiles(call: CodedCall) -> str | None:
    stored = storage(call.format)
    if call.dtype != torch.bfloat16:
        return f"its tiles multiply bfloat16; x is {call.dtype}"
    if call.rows < AMX_ROWS:
        return f"{call.rows} rows do not fill a tile; it starts at {AMX_ROWS}"
    if stored.integers and not stored.is_bf16:
        return f"{call.format} is computed in integers"
    if not stored.integers and not stored.widens:
        return f"it does not widen the codes of {call.format}"
    return "the scale of a column multiplies x in fp32" if stored.by_column else _refuses(call)


def _refuses_vectors(call: CodedCall) -> str | None:
    stored = storage(call.format)
    group = stored.format.block.columns
    if not stored.widens:
        return f"it does not widen the codes of {call.format}"
    if not call.packed and group is not None and group < call.columns and group & (group - 1):
        return f"groups of {group} columns are no power of two"
    return _refuses(call)


def words(call: CodedCall) -> str:
    """The element of kernels that multiply 16-bit words of x."""
    return "int16"


table.register(
    table.Operation(
        "linear_coded",
        describe,
        (
            table.Kernel("float-linear-amx", "amx", Compiled(_C.float_amx), _refuses_bf16_tiles, lambda call: "bf16"),
            table.Kernel("int-linear-amx", "amx", Compiled(_C.int_amx), refuses_tiles, lambda call: "int8"),
            table.Kernel(
                "int-linear-avx512_vbmi", "avx512_vbmi", Compiled(_C.int_avx512_vbmi), refuses_integers, words
            ),
            table.Kernel("float-linear-avx512_vbmi", "avx512_vbmi", Compiled(_C.float_avx512_vbmi), _refuses_vectors),
            table.Kernel("int-linear-avx512", "avx512", Compiled(_C.int_avx512), refuses_integers, words),
            table.Kernel("float-linear-avx512", "avx512", Compiled(_C.float_avx512), _refuses_vectors),
            table.Kernel("int-linear-avx2", "avx2", Compiled(_C.int_avx2), refuses_integers, words),
            table.Kernel("float-linear-avx2", "avx2", Compiled(_C.float_avx2), _refuses_vectors),
            table.Kernel("int-linear-generic", "generic", Compiled(_C.int_generic), refuses_integers, words),
            table.Kernel("float-linear-generic", "generic", Compiled(_C.float_generic), _refuses),
            table.Kernel("coded-linear-torch", table.TORCH, reference.linear_coded),
        ),
    )
)

SIGNATURE = (
    "(Tensor x, Tensor codes, Tensor? scale, Tensor? zero, Tensor? global_scale, Tensor? bias, str format,"
    f" int columns, int outputs, {epilogue.SCHEMA}) -> Tensor"
)
LIBRARY.define(f"linear_coded{SIGNATURE}")


_cpu = remembering(NAME, describe, check)


def fake(
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
    return x.new_empty((*x.shape[:-1], rows_of(codes, outputs)))


table.implement(NAME, check, fake, _cpu)
differentiate_coded(NAME)


def linear_coded(
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
    """y [..., N] = activation(x [..., K] @ W.T + bias) + addend, in x's dtype (fp32, bf16 or fp16), rounded once.

    W [N, K] is stored in `format`, whose name this is; codes, scale, zero and global_scale are its tensors
    (`Format.tensors`), None for those that it has not, or the panels that `pack` made of them; `columns` is K, and
    `outputs`, which panels need, N. Where codes are computed in integers a row of x
    with inf or NaN becomes NaN as a whole. `activation` is none, silu, gelu, gelu_tanh, relu or relu_squared, and
    `addend` [..., N] has x's dtype or fp32. Differentiable with respect to x, bias and addend. Raises ValueError or
    TypeError naming the argument.
    """
    arguments = (x, codes, scale, zero, global_scale, bias, format, columns, outputs, activation, addend)
    if undispatched(x, codes, scale, zero, global_scale, bias, addend):
        return _cpu(*arguments)
    return torch.ops.parco.linear_coded.default(*arguments)
