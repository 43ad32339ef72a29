"""linear_blocks: y = x @ W.T + bias for a matrix W of which every band of rows keeps some square blocks."""

import torch
from torch import Tensor

from parco import _C
from parco.kernels import table
from parco.kernels.library import LIBRARY, check_matrix, undispatched
from parco.kernels.sparse import operation, reference
from parco.kernels.sparse.kept import index_dtype
from parco.kernels.sparse.operation import SparseCall, compiled, refuses, refuses_many

NAME = "linear_blocks"


def describe(
    x: Tensor,
    values: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    blocks: Tensor,
    bias: Tensor | None,
    format: str,
    columns: int,
    block: int,
) -> SparseCall:
    """The table's key of a call."""
    return operation.describe(x, values, format, columns, blocks.shape[1] * block, block)


def check(
    x: Tensor,
    values: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    blocks: Tensor,
    bias: Tensor | None,
    format: str,
    columns: int,
    block: int,
) -> None:
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit together."""
    if block not in (16, 32, 64):
        raise ValueError(f"{NAME}: block={block}; a block's side is 16, 32 or 64")
    if blocks.ndim != 2 or blocks.shape[1] > -(-columns // block):
        raise ValueError(
            f"{NAME}: blocks has the shape {tuple(blocks.shape)}; at most {-(-columns // block)} blocks for each band "
            "of rows are needed"
        )
    operation.check(NAME, x, values, scale, zero, global_scale, bias, format, columns, blocks.shape[1] * block)
    bands = -(-values.shape[0] // block)
    check_matrix(NAME, "blocks", blocks, (bands, blocks.shape[1]), index_dtype(columns, block))


table.register(
    table.Operation(
        NAME,
        describe,
        (
            table.Kernel("blocks-linear-avx512", "avx512", compiled(_C.sparse_blocks_avx512, NAME), refuses),
            table.Kernel("blocks-linear-avx2", "avx2", compiled(_C.sparse_blocks_avx2, NAME), refuses),
            table.Kernel("blocks-linear-generic", "generic", compiled(_C.sparse_blocks_generic, NAME), refuses_many),
            table.Kernel("blocks-linear-torch", table.TORCH, reference.product(reference.blocks)),
        ),
    )
)

LIBRARY.define(
    f"{NAME}(Tensor x, Tensor values, Tensor? scale, Tensor? zero, Tensor? global_scale, Tensor blocks, Tensor? bias,"
    " str format, int columns, int block) -> Tensor"
)


def _fake(
    x: Tensor,
    values: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    blocks: Tensor,
    bias: Tensor | None,
    format: str,
    columns: int,
    block: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


_cpu = table.implement(NAME, check, _fake)
operation.differentiate_sparse(NAME, reference.blocks, lambda block: block)


def linear_blocks(
    x: Tensor,
    values: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    blocks: Tensor,
    bias: Tensor | None,
    format: str,
    columns: int,
    block: int,
) -> Tensor:
    """y [..., N] = x [..., K] @ W.T + bias in x's dtype (fp32, bf16 or fp16), summed in fp32 and rounded once.

    Rows `block`·b to `block`·(b + 1) of W [N, columns] have numbers in the block columns blocks[b] (int16, int32 above
    2¹⁵ of them), which ascend, and zeros elsewhere. values, scale, zero and global_scale are the tensors of `format`,
    whose name this is, for the matrix [N, kept·block] of their numbers; None for those that it has not. `block` is 16,
    32 or 64. Differentiable with respect to x and bias. Raises ValueError or TypeError naming the argument, and
    IndexError for a block that the matrix has not or that is out of order.
    """
    arguments = (x, values, scale, zero, global_scale, blocks, bias, format, columns, block)
    if undispatched(x, values, scale, zero, global_scale, blocks, bias):
        return _cpu(*arguments)
    return torch.ops.parco.linear_blocks.default(*arguments)
