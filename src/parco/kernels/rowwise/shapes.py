"""What norms share: the call's description, and which shapes and dtypes fit together."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from parco import machine
from parco.kernels.library import TYPES, check_float


class NormCall(NamedTuple):
    """One call of a norm on `rows` by `columns` numbers of `dtype`."""

    device: str
    isa: str
    dtype: torch.dtype
    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns} of {self.dtype}"


def describe(x: Tensor, weight: Tensor, *_: Any) -> NormCall:
    """The table's key of a call."""
    columns = weight.shape[0]
    return NormCall(x.device.type, machine.isa(), x.dtype, x.numel() // max(columns, 1), columns)


def refuses(call: NormCall) -> str | None:
    """Why compiled kernels do not run a call, or None."""
    return None if call.rows and call.columns else "one of the sizes is 0"


def check_columns(operation: str, x: Tensor, **tensors: Tensor | None) -> None:
    """Raise ValueError or TypeError, naming the argument, unless each of `tensors` that is there has one number per
    column of x, and all have x's dtype or all are fp32.
    """
    check_float(operation, "x", x)
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    common = next(iter(given.values())).dtype
    for name, tensor in given.items():
        if tensor.dtype != common or common not in (x.dtype, torch.float32):
            raise TypeError(f"{operation}: {name} is {tensor.dtype}; {x.dtype}, which x is, or float32 is needed")
        if tensor.ndim != 1 or x.ndim == 0 or x.shape[-1] != tensor.shape[0]:
            raise ValueError(
                f"{operation}: {name} has the shape {tuple(tensor.shape)}; one number per column of x, which is "
                f"{tuple(x.shape)}, is needed"
            )


def check_result(operation: str, argument: str, x: Tensor, dtype: torch.dtype | None) -> None:
    """Raise TypeError unless y may have that dtype: x's, or where x is fp32 a shorter one."""
    if dtype is not None and (dtype not in TYPES or (dtype != x.dtype != torch.float32)):
        raise TypeError(f"{operation}: {argument} is {dtype}; {x.dtype}, which x is, is needed")
