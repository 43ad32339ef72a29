"""linear_masked: y = x @ W.T + bias for a matrix W of which each row keeps some numbers, marked by a bit for every
number.
"""

import torch
from torch import Tensor

from parco import _C
from parco.kernels import table
from parco.kernels.library import LIBRARY, check_matrix, undispatched
from parco.kernels.sparse import operation, reference
from parco.kernels.sparse.kept import mask_bytes
from parco.kernels.sparse.operation import SparseCall, compiled, refuses, refuses_many

NAME = "linear_masked"


def describe(
    x: Tensor,
    values: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    mask: Tensor,
    bias: Tensor | None,
    format: str,
    columns: int,
    kept: int,
) -> SparseCall:
    """The table's key of a call."""
    return operation.describe(x, values, format, columns, kept, 1)


def check(
    x: Tensor,
    values: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    mask: Tensor,
    bias: Tensor | None,
    format: str,
    columns: int,
    kept: int,
) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit together."""
    operation.check(NAME, x, values, scale, zero, global_scale, bias, format, columns, kept)
    if kept > columns:
        raise ValueError(f"{NAME}: kept={kept} of columns={columns}")
    check_matrix(NAME, "mask", mask, (values.shape[0], mask_bytes(columns)), torch.uint8)


table.register(
    table.Operation(
        NAME,
        describe,
        (
            table.Kernel(
                "masked-linear-avx512_vbmi", "avx512_vbmi", compiled(_C.sparse_masked_avx512_vbmi, NAME), refuses
            ),
            table.Kernel("masked-linear-avx512", "avx512", compiled(_C.sparse_masked_avx512, NAME), refuses),
            table.Kernel("masked-linear-avx2", "avx2", compiled(_C.sparse_masked_avx2, NAME), refuses),
            table.Kernel("masked-linear-generic", "generic", compiled(_C.sparse_masked_generic, NAME), refuses_many),
            table.Kernel("masked-linear-torch", table.TORCH, reference.product(reference.masked)),
        ),
    )
)

LIBRARY.define(
    f"{NAME}(Tensor x, Tensor values, Tensor? scale, Tensor? zero, Tensor? global_scale, Tensor mask, Tensor? bias,"
    " str format, int columns, int kept) -> Tensor"
)


def _fake(
    x: Tensor,
    values: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    mask: Tensor,
    bias: Tensor | None,
    format: str,
    columns: int,
    kept: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


_cpu = table.implement(NAME, check, _fake)
operation.differentiate_sparse(NAME, reference.masked, lambda kept: 1)


def linear_masked(
    x: Tensor,
    values: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    mask: Tensor,
    bias: Tensor | None,
    format: str,
    columns: int,
    kept: int,
) -> Tensor:
    """y [..., N] = x [..., K] @ W.T + bias in x's dtype (fp32, bf16 or fp16), summed in fp32 and rounded once.

    Row n of W [N, columns] has its `kept` numbers where the bits of mask [N, ceil(columns/8)] uint8, lowest first, are
    set, in the order of columns, and zeros elsewhere. values, scale, zero and global_scale are the tensors of `format`,
    whose name this is, for the matrix [N, kept] of these numbers; None for those that it has not. A row of the mask
    with another number of bits makes results that mean nothing. Differentiable with respect to x and bias. Raises
    ValueError or TypeError naming the argument.
    """
    arguments = (x, values, scale, zero, global_scale, mask, bias, format, columns, kept)
    if undispatched(x, values, scale, zero, global_scale, mask, bias):
        return _cpu(*arguments)
    return torch.ops.parco.linear_masked.default(*arguments)
