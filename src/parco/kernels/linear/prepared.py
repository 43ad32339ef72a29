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
    x = torch.empty(rows, chain.parse(plan)[0][-1].columns, dtype=dtype, device="meta")
    chain.check(x, tensors, bias, plan)
    call = chain.describe(x, tensors, bias, plan)._replace(device=tensors[0].device.type)
    kept = (*tensors, *(() if bias is None else (bias,)))
    if table.choose(chain.NAME, call).isa == table.TORCH or not all(tensor.is_contiguous() for tensor in kept):
        return None
    if chain.digits(call):
        return None
    found, places = chain.compiled_chain(call, tensors, bias)
    return found.placed(chain.addresses(places, tensors), 0 if bias is None else bias.data_ptr())
