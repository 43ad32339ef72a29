"""The specification of the linear operations in plain torch: slow, on any device, obviously right."""

import torch
from torch import Tensor

from parco.formats import Format
from parco.kernels.cast import decode_tensors


def _named(*tensors: Tensor | None) -> dict[str, Tensor]:
    names = ("codes", "scale", "zero", "global_scale")
    return {name: tensor for name, tensor in zip(names, tensors, strict=True) if tensor is not None}


def dense(
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    columns: int,
) -> Tensor:
    """The whole matrix in fp32, [N, columns]."""
    return decode_tensors(format, (codes.shape[0], columns), _named(codes, scale, zero, global_scale))


def linear_coded(
    x: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    bias: Tensor | None,
    format: str,
    columns: int,
) -> Tensor:
    """x @ decode(...).T + bias in fp32 arithmetic, rounded once to x's dtype: [..., K] -> [..., N]."""
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], codes.shape[0]))
    return linear_dense(x, dense(codes, scale, zero, global_scale, format, columns), bias)


def linear_dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias in fp32 arithmetic, rounded once to x's dtype: [..., K] -> [..., N]."""
    return torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def embedding_coded(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows `indices` of decode(...): [...] -> [..., columns]. IndexError for a row that is not there."""
    block_rows = Format.parse(format).block.rows
    if block_rows not in (1, None):
        # Rows share scales with their neighbours, so all are decoded.
        tensors = _named(codes, scale, zero, global_scale)
        return torch.nn.functional.embedding(indices, decode_tensors(format, (codes.shape[0], columns), tensors, dtype))
    rows = indices.reshape(-1)
    if block_rows == 1:
        scale = None if scale is None else scale.index_select(0, rows)
        zero = None if zero is None else zero.index_select(0, rows)
    taken = _named(codes.index_select(0, rows), scale, zero, global_scale)
    return decode_tensors(format, (rows.numel(), columns), taken, dtype).reshape(*indices.shape, columns)
