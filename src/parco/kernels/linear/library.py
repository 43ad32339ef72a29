"""The library `parco` of torch operations, and the checks that its linear operations share.

`Library.define` and `impl` cost about a third of the `custom_op` decorator per call, which shows on small models.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("parco", "FRAGMENT")

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The numbers by which C++ knows float dtypes (`parco::linear::Type`)."""


def autograd(name: str, fake: Callable[..., Tensor], setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Register an operation's fake implementation and its derivative."""
    torch.library.register_fake(f"parco::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"parco::{name}", backward, setup_context=setup, lib=LIBRARY)


def check_float(operation: str, argument: str, tensor: Tensor) -> None:
    """TypeError unless `tensor` is fp32, bf16 or fp16."""
    if tensor.dtype not in TYPES:
        raise TypeError(f"{operation}: {argument} is {tensor.dtype}; float32, bfloat16 or float16 is needed")


def check_matrix(operation: str, argument: str, tensor: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """TypeError or ValueError unless `tensor` has that dtype and shape."""
    if tensor.dtype != dtype:
        raise TypeError(f"{operation}: {argument} is {tensor.dtype}; {dtype} is needed")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{operation}: {argument} has the shape {tuple(tensor.shape)}; {shape} is needed")
