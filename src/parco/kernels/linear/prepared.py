"""Products with everything but x settled, for C++ that calls several in a row (csrc/decode)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from parco import _C
from parco.kernels import table
from parco.kernels.linear import chain


def prepared(
    dtype: torch.dtype, tensors: Sequence[Tensor], bias: Tensor | None, plan: str, rows: int = 1
) -> _C.Chain | None:
    """`linear_chain` of so many rows of `dtype` by the kernels that the operations of its factors would choose, or None
    where one of them is no compiled kernel, or codes are not yet as kernels read them. It keeps the tensors' addresses
    and not the tensors. Raises as the operation does.
    """
    call = _call(dtype, tensors, bias, plan, rows)
    if _kernels(call, tensors, bias) is None:
        return None
    found, places = chain.compiled_chain(call, tensors, bias)
    return found.placed(chain.addresses(places, tensors), 0 if bias is None else bias.data_ptr())


def kernels(
    dtype: torch.dtype, tensors: Sequence[Tensor], bias: Tensor | None, plan: str, rows: int = 1
) -> tuple[str, ...] | None:
    """The names of the kernels in what `prepared` gives."""
    return _kernels(_call(dtype, tensors, bias, plan, rows), tensors, bias)


def _call(dtype: torch.dtype, tensors: Sequence[Tensor], bias: Tensor | None, plan: str, rows: int) -> chain.ChainCall:
    x = torch.empty(rows, chain.parse(plan)[0][-1].columns, dtype=dtype, device="meta")
    chain.check(x, tensors, bias, plan)
    return chain.describe(x, tensors, bias, plan)._replace(device=tensors[0].device.type)


def _kernels(call: chain.ChainCall, tensors: Sequence[Tensor], bias: Tensor | None) -> tuple[str, ...] | None:
    kept = (*tensors, *(() if bias is None else (bias,)))
    if table.choose(chain.NAME, call).isa == table.TORCH or not all(tensor.is_contiguous() for tensor in kept):
        return None
    return None if chain.digits(call) else tuple(kernel.name for _, kernel in call.factors())
