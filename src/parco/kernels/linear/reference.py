"""The specification of the linear operations in plain torch: slow, on any device, obviously right."""

import torch
from torch import Tensor

from parco.kernels.cast.packing import unpack


def dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """(u − z)·scale in fp32, rounded once to `dtype`: [N, columns] from the stored tensors of `linear_int`."""
    numbers = unpack(codes, bits, columns).to(torch.int16)
    group = max(1, min(group, columns))
    if zero is None:
        numbers = numbers - (1 << (bits - 1))
    else:
        numbers = numbers - spread(zero, group, columns).to(torch.int16)
    return (numbers.float() * spread(scale, group, columns).float()).to(dtype)


def spread(per_group: Tensor, group: int, columns: int) -> Tensor:
    """[N, groups] -> [N, columns], each value repeated over its group."""
    return per_group.repeat_interleave(group, dim=1)[:, :columns]


def linear_int(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    columns: int,
) -> Tensor:
    """x @ dequantize(...).T + bias in fp32 arithmetic, rounded once to x's dtype: [..., K] -> [..., N]."""
    weight = dequantize(codes, scale, zero, bits, group, columns, torch.float32)
    return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def linear_dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias in fp32 arithmetic, rounded once to x's dtype: [..., K] -> [..., N]."""
    return torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


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
    """Rows `indices` of dequantize(...): [...] -> [..., columns]. IndexError for a row that is not there."""
    rows = indices.reshape(-1)
    taken = dequantize(
        codes[rows],
        scale if scale.shape[0] == 1 else scale[rows],
        None if zero is None else zero[rows],
        bits,
        group,
        columns,
        dtype,
    )
    return taken.reshape(*indices.shape, columns)
