"""What may become of a product before its one rounding: y = activation(x @ W.T + bias) + addend, all in fp32.

An addend in place of an addition afterwards spares two passes over y and a rounding: the residual of a block, the other
terms of a sum. Reading it costs nothing where there is none.
"""

from typing import Any

import torch
from torch import Tensor

from parco.kernels.activations import ACTIVATIONS, NONE, NUMBERS, slope
from parco.kernels.library import TYPES

SCHEMA = "str activation='none', Tensor? addend=None"
"""The arguments with which the schema of an operation that takes one ends."""


def check(operation: str, x: Tensor, outputs: int, activation: str, addend: Tensor | None) -> None:
    """ValueError or TypeError, naming the argument, unless they fit a product of x with `outputs` rows."""
    if activation not in NUMBERS:
        raise ValueError(f"{operation}: activation={activation!r}; one of {', '.join(NUMBERS)} is needed")
    if addend is None:
        return
    if addend.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"{operation}: addend is {addend.dtype}; float32 or {x.dtype}, which x is, is needed")
    shape = (*x.shape[:-1], outputs)
    if tuple(addend.shape) != shape:
        raise ValueError(f"{operation}: addend has the shape {tuple(addend.shape)}; {shape} is needed")


def finish(y: Tensor, activation: str, addend: Tensor | None) -> Tensor:
    """activation(y) + addend for y in fp32: the specification."""
    if activation != NONE:
        y = ACTIVATIONS[activation](y)
    return y if addend is None else y + addend.float()


def through(grad: Tensor, before: Tensor, activation: str) -> Tensor:
    """The gradient of what the activation was applied to, `before`, from that of y; both fp32."""
    return grad * slope(before, activation)


def given(inputs: tuple[Any, ...], required: int) -> tuple[str, Tensor | None]:
    """(activation, addend) of an operation's inputs: what is left at its default the dispatcher leaves out."""
    following = inputs[required:]
    return (following[0] if following else NONE), (following[1] if len(following) > 1 else None)


def type_of(addend: Tensor | None) -> int:
    """C++'s number of its dtype, 0 without one."""
    return 0 if addend is None else TYPES[addend.dtype]
