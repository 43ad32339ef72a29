"""The library `parco` of torch operations, and the checks that operations share.

`Library.define` and `impl` cost about a third of the `custom_op` decorator per call, which shows on small models.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from parco.formats import Format, ScaleE4M3, ScaleE8M0

LIBRARY = torch.library.Library("parco", "FRAGMENT")

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The numbers by which C++ knows float dtypes (`parco::linear::Type`)."""

BYTE_SCALES: dict[type, int] = {ScaleE8M0: 3, ScaleE4M3: 4}
"""The numbers by which C++ knows scales of one byte (the same)."""


def scale_type(format: Format, scale: Tensor | None) -> int:
    """C++'s number of the type in which a format's scales are stored, 0 without any."""
    return number_of_scales(format, None if scale is None else scale.dtype)


def number_of_scales(format: Format, dtype: torch.dtype | None) -> int:
    """`scale_type` of scales of `dtype`, None for a format without any."""
    number = BYTE_SCALES.get(type(format.scale))
    return number if number is not None else 0 if dtype is None else TYPES[dtype]


def differentiate(
    name: str,
    needs: Callable[..., bool],
    setup: Callable[..., None],
    backward: Callable[..., Any],
    composed: Callable[..., Tensor | None] = lambda *_: None,
) -> None:
    """Register an operation's derivative. `needs(*arguments)` says whether any argument requires a gradient. Where
    gradients are on, `composed(*arguments)` may give the result by other operations, which then differentiate.

    This is what `torch.library.register_autograd` does, less half of its cost per call where no gradient is wanted.
    """
    operation = getattr(torch.ops.parco, name).default

    def forward(*arguments: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():  # pyright: ignore[reportPrivateUsage]
            return operation(*arguments)

    methods = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup),
        "backward": staticmethod(backward),
    }
    function = cast(Any, type(f"Parco_{name}", (torch.autograd.Function,), methods))

    def differentiable(*arguments: Any) -> Tensor:
        found = composed(*arguments) if torch.is_grad_enabled() else None
        if found is not None:
            return found
        if torch.is_grad_enabled() and (needs(*arguments) or _dual_numbers()):
            return function.apply(*arguments)  # of a forward derivative it says that there is none
        return forward(*arguments)

    LIBRARY.impl(name, differentiable, "Autograd")


PLAIN = (Tensor, torch.nn.Parameter)
"""Tensors that are numbers in memory; other subclasses may be anything."""


def untraced(*tensors: Tensor | None) -> bool:
    """Whether these are numbers in the CPU's memory and nothing else: no subclass, and nobody traces or transforms."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in PLAIN or not tensor.is_cpu):
            return False
    tracing: Any = torch._C._get_tracing_state()  # pyright: ignore[reportPrivateUsage]
    return (
        tracing is None
        and torch._C._len_torch_dispatch_stack() == 0  # pyright: ignore[reportPrivateUsage]
        and not transformed()
    )


def transformed() -> bool:
    """Whether one of torch.func's transforms or forward-mode differentiation is at work, for which parco's derivatives
    are not made.
    """
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore


def undispatched(*tensors: Tensor | None) -> bool:
    """Whether PyTorch's dispatcher would only pass a call on to the CPU's kernel: untraced tensors, no gradients
    wanted, no profiler. A caller may then call the kernel itself: on its way through the dispatcher a call costs 4
    microseconds, and some 35 where the model's weights have just swept the interpreter out of the cache.
    """
    return (
        not torch.is_grad_enabled()
        and untraced(*tensors)
        and not torch.autograd._profiler_enabled()  # pyright: ignore
        and not _dual_numbers()
    )


def _dual_numbers() -> bool:
    return torch.autograd.forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]


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


F = TypeVar("F", bound=Callable[..., Any])


def graph_break(function: F) -> F:
    """`function` behind a break of torch.compile's graph, with its own type.

    The compiler is not imported for it, which takes longer than all else that `import parco` does: where nobody has
    imported it, nobody compiles.
    """
    outside: list[F] = []

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if not torch.compiler.is_compiling() and "torch._dynamo" not in sys.modules:
            return function(*arguments, **options)
        if not outside:
            outside.append(cast(F, torch.compiler.disable(function)))
        return outside[0](*arguments, **options)

    return cast(F, call)
