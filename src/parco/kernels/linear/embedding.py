"""embedding_int: rows of a table of integer codes, expanded."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from parco import _C, machine
from parco.kernels import table
from parco.kernels.library import LIBRARY, TYPES
from parco.kernels.linear import reference
from parco.kernels.linear.integer import check_codes


class EmbeddingCall(NamedTuple):
    """One call of embedding_int: `rows` indices into a table of `outputs` by `columns` codes, expanded to `dtype`."""

    device: str
    isa: str
    dtype: torch.dtype
    rows: int
    outputs: int
    columns: int
    bits: int
    group: int

    def __str__(self) -> str:
        codes = f"int{self.bits} codes {self.outputs}x{self.columns}, groups of {self.group}"
        return f"{self.rows} rows of {codes}, as {self.dtype}"


def describe(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
) -> EmbeddingCall:
    """The table's key of a call."""
    device, isa = codes.device.type, machine.isa()
    return EmbeddingCall(device, isa, dtype, indices.numel(), codes.shape[0], columns, bits, group)


def check(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit together."""
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"embedding_int: indices are {indices.dtype}; int64 or int32 is needed")
    if dtype not in TYPES:
        raise TypeError(f"embedding_int: dtype is {dtype}; float32, bfloat16 or float16 is needed")
    check_codes("embedding_int", codes, scale, zero, bits, group, columns)


def _compiled(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    indices, codes, scale = indices.to(torch.int64).contiguous(), codes.contiguous(), scale.contiguous()
    zero = None if zero is None else zero.contiguous()
    y = torch.empty((*indices.shape, columns), dtype=dtype)
    wrong = _C.embedding_int_generic(
        indices.data_ptr(),
        codes.data_ptr(),
        scale.data_ptr(),
        0 if zero is None else zero.data_ptr(),
        y.data_ptr(),
        indices.numel(),
        codes.shape[0],
        columns,
        group,
        scale.shape[1] if scale.shape[0] == codes.shape[0] else 0,
        bits,
        TYPES[scale.dtype],
        TYPES[dtype],
        torch.get_num_threads(),
    )
    if wrong >= 0:
        index = int(indices.reshape(-1)[wrong])
        raise IndexError(f"embedding_int: index {index} is outside the table's {codes.shape[0]} rows")
    return y


table.register(
    table.Operation(
        "embedding_int",
        describe,
        (
            table.Kernel("int-embedding-generic", "generic", _compiled),
            table.Kernel("int-embedding-torch", table.TORCH, reference.embedding_int),
        ),
    )
)

LIBRARY.define(
    "embedding_int(Tensor indices, Tensor codes, Tensor scale, Tensor? zero, int bits, int group, int columns,"
    " ScalarType dtype) -> Tensor"
)


def _reference(*arguments: Any) -> Tensor:
    check(*arguments)
    return reference.embedding_int(*arguments)


def _cpu(*arguments: Any) -> Tensor:
    check(*arguments)
    return table.choose("embedding_int", describe(*arguments)).run(*arguments)


def _fake(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    check(indices, codes, scale, zero, bits, group, columns, dtype)
    return codes.new_empty((*indices.shape, columns), dtype=dtype)


LIBRARY.impl("embedding_int", _reference, "CompositeExplicitAutograd")
LIBRARY.impl("embedding_int", _cpu, "CPU")
torch.library.register_fake("parco::embedding_int", _fake, lib=LIBRARY)


def embedding_int(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows `indices` [...] (int64 or int32, from 0) of the matrix (u − z)·scale as `dtype`: [..., columns].

    The stored tensors are those of `linear_int`; each value is computed in fp32 and rounded once. Raises IndexError
    for a row outside the table, ValueError or TypeError naming the argument otherwise.
    """
    return torch.ops.parco.embedding_int.default(indices, codes, scale, zero, bits, group, columns, dtype)
