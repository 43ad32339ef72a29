"""Products of one row with everything but x settled, for C++ that calls several in a row (csrc/decode)."""

from types import ModuleType

import torch
from torch import Tensor

from parco import _C
from parco.kernels import table
from parco.kernels.library import TYPES
from parco.kernels.linear import coded, dense
from parco.kernels.linear.panels import is_packed
from parco.kernels.linear.storage import rows_of, settle, storage


def coded_product(
    operation: ModuleType,
    dtype: torch.dtype,
    codes: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    global_scale: Tensor | None,
    bias: Tensor | None,
    format: str,
    columns: int,
    outputs: int = 0,
) -> _C.Product | None:
    """The operation of the module `coded` or `int8` on one row of `dtype` by the kernel that it would choose, or None
    where that is no compiled one. It keeps the tensors' addresses and not the tensors. Raises as the operation does.
    """
    x = torch.empty(1, columns, dtype=dtype, device="meta")
    tensors = (codes, scale, zero, global_scale, bias)
    operation.check(x, *tensors, format, columns, outputs)
    call = operation.describe(x, *tensors, format, columns, outputs)
    kernel = table.choose(operation.NAME, call._replace(device=codes.device.type))
    if not isinstance(kernel.run, coded.Compiled) or storage(format).by_column or not _contiguous(*tensors):
        return None
    rows, packed = rows_of(codes, outputs), is_packed(codes)
    settled = settle(storage(format), 1, rows, columns, dtype, scale, bias, packed, kernel.run.int8)
    return _C.coded_product(kernel.name, settled, *map(_address, tensors))


def dense_product(dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> _C.Product | None:
    """The same of `linear_dense`."""
    outputs, columns = weight.shape
    x = torch.empty(1, columns, dtype=dtype, device="meta")
    dense.check(x, weight, bias)
    call = dense.describe(x, weight, bias)
    kernel = table.choose("linear_dense", call._replace(device=weight.device.type))
    if kernel.isa == table.TORCH or not _contiguous(weight, bias):
        return None
    kind = 0 if bias is None else TYPES[bias.dtype]
    return _C.dense_product(
        kernel.name, _address(weight), _address(bias), outputs, columns, TYPES[dtype], TYPES[weight.dtype], kind
    )


def _contiguous(*tensors: Tensor | None) -> bool:
    return all(tensor is None or tensor.is_contiguous() for tensor in tensors)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
