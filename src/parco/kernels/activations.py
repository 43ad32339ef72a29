"""The activation functions that kernels know, in plain torch, and their derivatives."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def _relu_squared(x: Tensor) -> Tensor:
    return functional.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "relu_squared": _relu_squared,
}
"""Name -> the function in plain torch, in the order of `parco::linear::Activation`."""

NONE = "none"
"""The name of no activation, where there may be one."""

NUMBERS = {NONE: -1} | {name: number for number, name in enumerate(ACTIVATIONS)}
"""The numbers by which C++ knows them."""


def slope(x: Tensor, activation: str) -> Tensor:
    """The activation's derivative at x."""
    match activation:
        case "silu":
            sigmoid = torch.sigmoid(x)
            return sigmoid * (1 + x * (1 - sigmoid))
        case "gelu" | "gelu_tanh":
            approximate = "none" if activation == "gelu" else "tanh"
            return torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate=approximate)
        case "relu":
            return (x > 0).to(x.dtype)
        case _:
            return 2 * functional.relu(x)
