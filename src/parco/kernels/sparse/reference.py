"""The specification of the sparse products in plain torch: the matrix with its zeros, then the dense product."""

from collections.abc import Callable

import torch
from torch import Tensor

from parco.formats import Format
from parco.kernels.cast.decoding import dequantize
from parco.kernels.linear import reference
from parco.kernels.sparse.kept import of_bands, spread_blocks, spread_masked

Stored = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""The tensors of a format: values or codes, scale, zero, global_scale."""

NAMES = ("scale", "zero", "global_scale")


def numbers(stored: Stored, format: str, kept: int) -> Tensor:
    """The kept numbers, fp32 [N, kept]."""
    form = Format.parse(format)
    values, *scales = stored
    if form.is_dense:
        return values.float()
    named = {name: tensor for name, tensor in zip(NAMES, scales, strict=True) if tensor is not None}
    return dequantize(form, (values.shape[0], kept), {"codes": values, **named}, torch.float32)


def masked(stored: Stored, mask: Tensor, format: str, columns: int, kept: int) -> Tensor:
    """The matrix fp32 [N, columns] that `linear_masked` multiplies by."""
    return spread_masked(numbers(stored, format, kept), mask, columns)


def blocks(stored: Stored, blocks: Tensor, format: str, columns: int, block: int) -> Tensor:
    """The matrix fp32 [N, columns] that `linear_blocks` multiplies by."""
    rows = torch.arange(stored[0].shape[0], device=blocks.device)
    kept = numbers(stored, format, blocks.shape[1] * block)
    return spread_blocks(kept, of_bands(blocks, rows, block), columns, block)


def product(dense: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """x @ W.T + bias of the operations' arguments with W as `dense` has it, in fp32 arithmetic, rounded once to x's
    dtype.
    """

    def run(
        x: Tensor,
        values: Tensor,
        scale: Tensor | None,
        zero: Tensor | None,
        global_scale: Tensor | None,
        where: Tensor,
        bias: Tensor | None,
        format: str,
        columns: int,
        size: int,
    ) -> Tensor:
        weight = dense((values, scale, zero, global_scale), where, format, columns, size)
        return reference.linear_dense(x, weight, bias)

    return run
