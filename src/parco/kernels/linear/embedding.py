"""embedding_coded: rows of a stored matrix, expanded."""

from typing import NamedTuple

import torch
from torch import Tensor

from parco import _C, machine
from parco.kernels import table
from parco.kernels.library import LIBRARY, TYPES, undispatched
from parco.kernels.linear import reference
from parco.kernels.linear.panels import is_packed
from parco.kernels.linear.storage import check_tensors, rows_of, settle, storage


class EmbeddingCall(NamedTuple):
    """One call of embedding_coded: `rows` indices into a matrix of `outputs` by `columns` codes, as `dtype`."""

    device: str
    isa: str
    dtype: torch.dtype
    rows: int
    outputs: int
    columns: int
    format: str
    packed: bool = False

    def __str__(self) -> str:
        return f"{self.rows} rows of {self.format} {self.outputs}x{self.columns}, as {self.dtype}"


def describe(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    columns: int,
    dtype: torch.dtype,
    outputs: int = 0,
) -> EmbeddingCall:
    """The table's key of a call."""
    shape = (indices.numel(), rows_of(codes, outputs), columns)
    return EmbeddingCall(codes.device.type, machine.isa(), dtype, *shape, format, is_packed(codes))


def check(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    columns: int,
    dtype: torch.dtype,
    outputs: int = 0,
) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit together."""
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"embedding_coded: indices are {indices.dtype}; int64 or int32 is needed")
    if dtype not in TYPES:
        raise TypeError(f"embedding_coded: dtype is {dtype}; float32, bfloat16 or float16 is needed")
    tensors = {"codes": codes, "scale": scale, "zero": zero, "global_scale": global_scale}
    check_tensors("embedding_coded", format, columns, outputs, tensors)


def _compiled(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    columns: int,
    dtype: torch.dtype,
    outputs: int = 0,
) -> Tensor:
    stored = storage(format)
    indices, codes = indices.to(torch.int64).contiguous(), codes.contiguous()
    scale = None if scale is None else scale.contiguous()
    zero = None if zero is None else zero.contiguous()
    y = torch.empty((*indices.shape, columns), dtype=dtype)
    wrong = _C.embedding_generic(
        settle(stored, indices.numel(), rows_of(codes, outputs), columns, dtype, scale, None, is_packed(codes)),
        indices.data_ptr(),
        codes.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        0 if zero is None else zero.data_ptr(),
        0 if global_scale is None else global_scale.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    if wrong >= 0:
        index = int(indices.reshape(-1)[wrong])
        raise IndexError(f"embedding_coded: index {index} is outside the {rows_of(codes, outputs)} rows")
    return y


def _refuses(call: EmbeddingCall) -> str | None:
    stored = storage(call.format)
    if stored.rewrites(call.packed):
        return "it reads bits, not digits: all rows would be rewritten for some"
    return "each column has a scale of its own" if stored.by_column else stored.refusal


table.register(
    table.Operation(
        "embedding_coded",
        describe,
        (
            table.Kernel("coded-embedding-generic", "generic", _compiled, _refuses),
            table.Kernel("coded-embedding-torch", table.TORCH, reference.embedding_coded),
        ),
    )
)

LIBRARY.define(
    "embedding_coded(Tensor indices, Tensor codes, Tensor? scale, Tensor? zero, Tensor? global_scale, str format,"
    " int columns, ScalarType dtype, int outputs) -> Tensor"
)


def _fake(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    columns: int,
    dtype: torch.dtype,
    outputs: int = 0,
) -> Tensor:
    return codes.new_empty((*indices.shape, columns), dtype=dtype)


_cpu = table.implement("embedding_coded", check, _fake)


def embedding_coded(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    columns: int,
    dtype: torch.dtype,
    outputs: int = 0,
) -> Tensor:
    """Rows `indices` [...] (int64 or int32, from 0) of a matrix stored in `format`, as `dtype`: [..., columns].

    The stored tensors and `outputs` are those of `linear_coded`; each number is computed in fp32 and rounded
    once. Raises IndexError for a row outside the matrix, ValueError or TypeError naming the argument otherwise.
    """
    if undispatched(indices, codes, scale, zero, global_scale):
        return _cpu(indices, codes, scale, zero, global_scale, format, columns, dtype, outputs)
    return torch.ops.parco.embedding_coded.default(
        indices, codes, scale, zero, global_scale, format, columns, dtype, outputs
    )
