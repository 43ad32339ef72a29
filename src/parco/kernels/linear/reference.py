"""The specification of the linear operations in plain torch: slow, on any device, obviously right."""

import torch
from torch import Tensor

from parco.formats import Format
from parco.kernels.activations import NONE
from parco.kernels.cast.decoding import dequantize
from parco.kernels.linear import epilogue, panels


def _named(format: str, columns: int, outputs: int, *tensors: Tensor | None) -> dict[str, Tensor]:
    """The format's tensors by name, by rows."""
    names = ("codes", "scale", "zero", "global_scale")
    named = {name: tensor for name, tensor in zip(names, tensors, strict=True) if tensor is not None}
    if panels.is_packed(named["codes"]):
        return panels.unpack(Format.parse(format), (outputs, columns), named)
    return named


def dense(
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    columns: int,
    outputs: int = 0,
) -> Tensor:
    """The whole matrix in fp32, [N, columns]."""
    named = _named(format, columns, outputs, codes, scale, zero, global_scale)
    return dequantize(Format.parse(format), (named["codes"].shape[0], columns), named, torch.float32)


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
    """activation(x @ decode(...).T + bias) + addend in fp32 arithmetic, rounded once to x's dtype: [..., K] ->
    [..., N].
    """
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], outputs or codes.shape[0]))
    weight = dense(codes, scale, zero, global_scale, format, columns, outputs)
    return linear_dense(x, weight, bias, activation, addend)


def linear_dense(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = NONE,
    addend: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """activation(x @ weight.T + bias) + addend in fp32 arithmetic, rounded once to `dtype`, by default that of x:
    [..., K] -> [..., N].
    """
    y = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return epilogue.finish(y, activation, addend).to(dtype or x.dtype)


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
    """Rows `indices` of decode(...): [...] -> [..., columns]. IndexError for a row that is not there."""
    form = Format.parse(format)
    block_rows = form.block.rows
    named = _named(format, columns, outputs, codes, scale, zero, global_scale)
    if block_rows not in (1, None):
        # Rows share scales with their neighbours, so all are decoded.
        dense = dequantize(form, (named["codes"].shape[0], columns), named, dtype)
        return torch.nn.functional.embedding(indices, dense)
    rows = indices.reshape(-1)
    own = ("codes", "scale", "zero") if block_rows == 1 else ("codes",)
    taken = {name: tensor.index_select(0, rows) if name in own else tensor for name, tensor in named.items()}
    return dequantize(form, (rows.numel(), columns), taken, dtype).reshape(*indices.shape, columns)
