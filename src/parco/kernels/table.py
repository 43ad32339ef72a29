"""The dispatch table: for each operation its kernels, best first, as data.

A kernel's name reads operation-isa, after what it computes with where an operation has several. For a call the first
kernel whose instruction set is usable and that does not refuse the call is chosen; the reference, in plain torch, is
the last of every list and refuses nothing. `explain` prints the choice and why every better kernel was passed over.
Choices depend on the device's type, shapes, dtypes, arguments that are no tensors and `parco.machine.isa()` only, so
they are cached.
"""

import functools
import importlib.util
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parco import machine
from parco.kernels.library import LIBRARY

TORCH = "torch"
"""The `isa` of a kernel written in plain torch, as the reference is: usable on every device."""

TRITON = "triton"
"""The `isa` of a kernel written in Triton: for tensors on CUDA."""


NATIVE = "PyTorch"
"""What runs a matrix that no operation of the table covers: the model's own layer, or rows of a dense matrix."""


class Call(Protocol):
    """What a choice may depend on: a hashable, printable description of one call. A NamedTuple with, among its fields,
    `device` (a device's type) and `isa`.
    """

    @property
    def device(self) -> str: ...

    @property
    def isa(self) -> str: ...

    def __hash__(self) -> int: ...

    def _replace(self, **fields: Any) -> Self: ...


@dataclass(frozen=True)
class Kernel:
    """One way to run an operation. `refuses(call)` is None where the kernel can run it, else the reason why not.

    `run` takes the arguments of the operation and returns what it does, a tensor or several. `isa` is one of
    `parco.machine.ISAS`, or TRITON, or TORCH. `element(call)` is what a product's multiply-adds are made of, one of
    `parco.machine.ELEMENTS`.
    """

    name: str
    isa: str
    run: Callable[..., Any]
    refuses: Callable[[Any], str | None] = lambda call: None
    element: Callable[[Any], str] = lambda call: "fp32"


@dataclass(frozen=True)
class Operation:
    """`describe(*arguments)` is the Call; `kernels` are listed best first; `parts(*arguments)` are the operations, and
    their calls on the CPU, that a call stands for.
    """

    name: str
    describe: Callable[..., Call]
    kernels: tuple[Kernel, ...]
    parts: Callable[..., Iterable[tuple[str, Call]]] = lambda *_: ()


@dataclass(frozen=True)
class Explanation:
    """The chosen kernel of one call, and (name, reason) of every better one in the table."""

    operation: str
    call: Call
    kernel: str
    passed_over: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{self.operation}: {self.kernel}", f"  for {self.call}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.passed_over]
        return "\n".join(lines)


_operations: dict[str, Operation] = {}


def register(operation: Operation) -> None:
    """Put an operation in the table. ValueError for a name that is there, or a list that does not end with the
    reference.
    """
    if operation.name in _operations:
        raise ValueError(f"operation {operation.name!r} is registered already")
    if not operation.kernels or operation.kernels[-1].isa != TORCH:
        raise ValueError(f"the kernels of {operation.name!r} must end with its reference in plain torch")
    _operations[operation.name] = operation


_settled: dict[Hashable, Callable[..., Any]] = {}
KEPT_CHOICES = 8192
"""Kinds of call (dtypes, shapes and all that is no tensor) whose checks and choice are remembered: together they cost
as much as a small operation.
"""


def _kind(argument: Any) -> Hashable:
    """What an argument has in common with those of other calls of a kind."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.shape
    return tuple(map(_kind, cast("list[Any]", argument))) if isinstance(argument, list) else argument


def implement(
    name: str,
    check: Callable[..., None],
    fake: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    drawn: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """Put a registered operation, which the library defines under the same name, behind the dispatcher; returns what
    runs on the CPU, for callers that need no dispatcher (`library.undispatched`).

    Its reference runs on every device, the chosen kernel on the CPU (or `cpu`, which checks and chooses itself) and, of
    an operation that has one in Triton, on CUDA; `fake` where a graph is traced. `check` sees the arguments first, and
    asks only for dtypes and shapes of tensors. Arguments at the positions `drawn` (seeds) are other ones in every call
    and have no say in the choice.
    """

    def everywhere(*arguments: Any) -> Any:
        check(*arguments)
        return _operations[name].kernels[-1].run(*arguments)

    def chosen_on(device: str) -> Callable[..., Any]:
        def chosen(*arguments: Any) -> Any:
            chosen_by = (a for i, a in enumerate(arguments) if i not in drawn) if drawn else arguments
            kind = (name, device, machine.isa(), *map(_kind, chosen_by))
            run = _settled.get(kind)
            if run is None:
                check(*arguments)
                run = choose(name, _operations[name].describe(*arguments)).run
                if len(_settled) >= KEPT_CHOICES:
                    _settled.clear()
                _settled[kind] = run
            return run(*arguments)

        return chosen

    def traced(*arguments: Any) -> Any:
        check(*arguments)
        given = [each for a in arguments for each in (a if isinstance(a, list | tuple) else (a,))]
        places = {str(each.device) for each in given if isinstance(each, torch.Tensor)}
        if len(places) > 1:  # some on the meta device, which has no numbers to compute with
            raise ValueError(f"{name}: tensors lie on {' and '.join(sorted(places))}; one device is needed")
        return fake(*arguments)

    on_cpu = cpu or chosen_on("cpu")
    LIBRARY.impl(name, everywhere, "CompositeExplicitAutograd")
    LIBRARY.impl(name, on_cpu, "CPU")
    if any(kernel.isa == TRITON for kernel in _operations[name].kernels):
        LIBRARY.impl(name, chosen_on("cuda"), "CUDA")
    torch.library.register_fake(f"parco::{name}", traced, lib=LIBRARY)
    return on_cpu


def operations() -> Mapping[str, Operation]:
    """The table: every registered operation by name."""
    return dict(_operations)


@functools.lru_cache(maxsize=8192)
def choose(name: str, call: Call) -> Kernel:
    """The kernel that runs `call`: the first of the operation's list that can."""
    for kernel in _operations[name].kernels:
        if _passes_over(kernel, call) is None:
            return kernel
    raise AssertionError(f"the reference of {name} refused {call}")


def explain_call(name: str, call: Call) -> Explanation:
    """As `choose`, with the reasons. ValueError for an unknown operation, naming the known ones."""
    if name not in _operations:
        raise ValueError(f"operation {name!r} is not in the table, which has {', '.join(sorted(_operations))}")
    kernel = choose(name, call)
    better = _operations[name].kernels[: _operations[name].kernels.index(kernel)]
    return Explanation(name, call, kernel.name, tuple((k.name, _passes_over(k, call) or "") for k in better))


def element_of(explained: Explanation) -> str:
    """What the multiply-adds of an explained product are made of, one of `parco.machine.ELEMENTS`."""
    return choose(explained.operation, explained.call).element(explained.call)


def _passes_over(kernel: Kernel, call: Call) -> str | None:
    if kernel.isa == TORCH:
        return kernel.refuses(call)
    if kernel.isa == TRITON:
        if call.device != "cuda":
            return f"it runs on CUDA, the tensors are on {call.device}"
        return kernel.refuses(call) if _has_triton() else "it needs Triton, which is not installed"
    if call.device != "cpu":
        return f"it runs on the CPU, the tensors are on {call.device}"
    if not machine.contains(call.isa, kernel.isa):
        if kernel.isa in machine.detect().isas:
            return f"it needs {kernel.isa} and PARCO_ISA={call.isa} asks for less"
        return f"it needs {kernel.isa}, which this machine lacks"
    return kernel.refuses(call)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class _Recorder(TorchDispatchMode):
    """Explains every operation of the table that runs inside it, as if its tensors were on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.explanations: list[Explanation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "parco" and name in _operations:
            call = _operations[name].describe(*args, **(kwargs or {}))
            self.explanations.append(explain_call(name, call._replace(device="cpu")))  # pyright: ignore[reportPrivateUsage]
            parts = _operations[name].parts(*args, **(kwargs or {}))
            self.explanations += [explain_call(part, own) for part, own in parts]
        return func(*args, **(kwargs or {}))


def explain(
    thing: object, *arguments: Any, rows: int = 1, dtype: torch.dtype = torch.float32, product: object = None
) -> tuple[Explanation, ...]:
    """Which kernels run `thing` on this CPU, one Explanation per operation of the table in the order in which they run.

    `thing` is the name of an operation, followed by the arguments of an example call; or a Weight, of which the product
    is explained; or a module that holds one: `parco.nn.Linear`, or `parco.nn.Embedding`, of which the lookup is. For
    these `rows` and `dtype` say of what the input (or the looked-up rows) consists; they are taken as packed, which a
    loaded model's are. `product` is a `parco.products.Product`, by default the module's. On CUDA an operation may have
    a kernel in Triton, of which `explain_call` knows; on other devices every operation runs as its reference. Raises
    TypeError for anything else.
    """
    if isinstance(thing, str):
        if thing not in _operations:
            raise ValueError(f"operation {thing!r} is not in the table, which has {', '.join(sorted(_operations))}")
        return (explain_call(thing, _operations[thing].describe(*arguments)),)
    spec = getattr(getattr(thing, "weight", None), "spec", thing)
    if not (callable(getattr(spec, "apply", None)) and callable(getattr(spec, "tensors", None))):
        raise TypeError(f"explain: {thing!r} is neither an operation's name, nor a Weight, nor a module that holds one")
    weight = cast(Any, spec)
    with torch.device("meta"):
        x = torch.empty(rows, weight.shape[1], dtype=dtype)
        tensors = [torch.empty(spec.shape, dtype=spec.dtype) for spec in weight.tensors().values()]
        indices = torch.empty(rows, dtype=torch.int64)
        packed = weight.pack(*tensors)
    product = getattr(getattr(thing, "weight", None), "product", None) if product is None else product
    options = {} if product is None else {"product": product}
    with torch.inference_mode(), _Recorder() as recorder:
        if hasattr(thing, "num_embeddings"):
            weight.lookup(indices, *packed, dtype=dtype)
        else:
            weight.apply(x, *packed, **options)
    return tuple(recorder.explanations)
