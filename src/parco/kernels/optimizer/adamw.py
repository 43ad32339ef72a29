"""adamw: one step of AdamW (Loshchilov and Hutter, arXiv 1711.05101) of several parameters, in place, each in one pass.

With g the gradient times `grad_factor`, in fp32 and in this order, which is that of PyTorch's update of one tensor:

    value  = value * (1 - lr * weight_decay)
    first  = first + (g - first) * (1 - beta1)              beta1 <= 0.5: g + (g - first) * -beta1
    second = second * beta2 + (1 - beta2) * g * g
    value  = value - lr / (1 - beta1**step) * first / (sqrt(second) / sqrt(1 - beta2**step) + epsilon)

Nothing is fused or reordered, so every kernel gives the bits of the reference. PyTorch's own kernels fuse some of the
products and sums, so its bits are others: of each of first, second and the step by some units of 2**-24.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from parco import _C, machine
from parco.kernels import table
from parco.kernels.cast.codes import signed
from parco.kernels.cast.philox import random_bits
from parco.kernels.cast.rounding import Rounding
from parco.kernels.library import LIBRARY, TYPES, undispatched
from parco.kernels.optimizer import states
from parco.kernels.optimizer.states import BLOCK, decode_moment, encode_moment

NAME = "adamw"
ROUNDINGS = tuple(rounding for rounding in get_args(Rounding) if rounding != "zero")
MOST_NUMBERS = 1 << 34
"""Numbers of a parameter that Philox's counter tells apart."""

Tensors = list[Tensor]


class AdamwCall(NamedTuple):
    """One call of adamw on `parameters` tensors with `numbers` numbers in all."""

    device: str
    isa: str
    parameters: int
    numbers: int

    def __str__(self) -> str:
        return f"{self.parameters} parameters with {self.numbers} numbers"


def describe(params: Tensors, *_: Any) -> AdamwCall:
    """The table's key of a call."""
    device = params[0].device.type if params else "cpu"
    return AdamwCall(device, machine.isa(), len(params), sum(param.numel() for param in params))


def shape_in_rows(tensor: Tensor) -> tuple[int, int]:
    """A parameter as rows and columns: its first dimension by the others; a vector is one row."""
    if tensor.ndim < 2:
        return 1, tensor.numel()
    return tensor.shape[0], tensor.numel() // max(tensor.shape[0], 1)


def scale_shape(tensor: Tensor) -> tuple[int, int]:
    """The shape of the scales of a parameter's 8-bit moments."""
    rows, columns = shape_in_rows(tensor)
    return rows, -(-columns // BLOCK)


def check(
    params: Tensors,
    grads: Tensors,
    firsts: Tensors,
    seconds: Tensors,
    first_scales: Tensors,
    second_scales: Tensors,
    steps: list[int],
    offsets: list[int],
    numbers: list[int],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    grad_factor: float,
    rounding: str,
    seed: int,
) -> None:
    """ValueError or TypeError, naming the argument, unless the arguments fit together."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"adamw: rounding={rounding!r}; one of {', '.join(ROUNDINGS)} is needed")
    coded = bool(first_scales)
    scales = {"first_scales": first_scales, "second_scales": second_scales} if coded or second_scales else {}
    lists: dict[str, list[Any]] = {"grads": grads, "firsts": firsts, "seconds": seconds, "steps": steps}
    for name, given in (lists | {"offsets": offsets, "numbers": numbers} | scales).items():
        if len(given) != len(params):
            raise ValueError(f"adamw: {name} has {len(given)} members; {len(params)}, as params, are needed")
    moment = torch.uint8 if coded else torch.float32
    for i, (param, grad, first, second) in enumerate(zip(params, grads, firsts, seconds, strict=True)):
        if param.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"adamw: params[{i}] is {param.dtype}; float32 or bfloat16 is needed")
        if grad.dtype not in TYPES or grad.layout != torch.strided:
            raise TypeError(f"adamw: grads[{i}] is {grad.dtype}, {grad.layout}; a dense tensor of floats is needed")
        if not first.dtype == second.dtype == moment:
            raise TypeError(f"adamw: firsts[{i}] is {first.dtype}, seconds[{i}] {second.dtype}; {moment} is needed")
        shape = param.shape
        if not (grad.shape == first.shape == second.shape == shape):
            shapes = tuple(grad.shape), tuple(first.shape), tuple(second.shape)
            raise ValueError(f"adamw: grads[{i}], firsts[{i}], seconds[{i}] are {shapes}; {tuple(shape)} is needed")
        if steps[i] < 1 or not 0 <= offsets[i] <= MOST_NUMBERS - param.numel():
            raise ValueError(f"adamw: steps[{i}]={steps[i]}, offsets[{i}]={offsets[i]}; at least 1 and 0 are needed")
        for name, given in scales.items():
            if given[i].dtype != torch.float32 or tuple(given[i].shape) != scale_shape(param):
                found = f"{given[i].dtype} {tuple(given[i].shape)}"
                raise ValueError(f"adamw: {name}[{i}] is {found}; float32 {scale_shape(param)} is needed")


def factors(steps: list[int], lr: float, beta1: float, beta2: float) -> Iterator[tuple[float, float]]:
    """Of each step minus lr / (1 - beta1**step), and sqrt(1 - beta2**step)."""
    known: dict[int, tuple[float, float]] = {}
    for step in steps:
        if step not in known:
            known[step] = -lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
        yield known[step]


def stream(number: int, step: int) -> int:
    """The row of Philox's counter at a step of the optimizer's parameter of that number; the column is a number's
    place in the parameter.
    """
    return (number << 32) + step


def drawn_bf16(x: Tensor, random: Tensor) -> Tensor:
    """fp32 `x` rounded to bf16 stochastically, by the low 16 of the `random` bits (int64): its expectation is x.
    Infinities and NaN stay.
    """
    bits = x.view(torch.int32)
    up = (bits + (random & 0xFFFF).to(torch.int32)) & -0x10000
    return torch.where(x.isfinite(), up.view(torch.float32), x).to(torch.bfloat16)


def reference(
    params: Tensors,
    grads: Tensors,
    firsts: Tensors,
    seconds: Tensors,
    first_scales: Tensors,
    second_scales: Tensors,
    steps: list[int],
    offsets: list[int],
    numbers: list[int],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    grad_factor: float,
    rounding: str,
    seed: int,
) -> None:
    """One parameter after the other."""
    for i, (step_size, second_root) in enumerate(factors(steps, lr, beta1, beta2)):
        shape = shape_in_rows(params[i])
        value, g = params[i].reshape(shape).to(torch.float32), grads[i].reshape(shape).to(torch.float32) * grad_factor
        first, second = firsts[i].reshape(shape), seconds[i].reshape(shape)
        if first_scales:
            first = decode_moment(first, first_scales[i], signed=True)
            second = decode_moment(second, second_scales[i], signed=False)
        # As torch.lerp, from the nearer end.
        first = first + (g - first) * (1 - beta1) if 1 - beta1 < 0.5 else g + (g - first) * -beta1
        second = second * beta2 + (g * (1 - beta2)) * g
        bottom = states.root(second) / second_root + epsilon
        value = value * (1 - lr * weight_decay) + (first * step_size) / bottom
        if params[i].dtype == torch.bfloat16 and rounding == "stochastic":
            row, places = stream(numbers[i], steps[i]), range(offsets[i], offsets[i] + value.numel())
            random = random_bits(seed % (1 << 64), range(row, row + 1), places, device=value.device)
            value = drawn_bf16(value, random.reshape(shape))
        params[i].copy_(value.reshape(params[i].shape))
        if first_scales:
            first, scale = encode_moment(first, signed=True)
            first_scales[i].copy_(scale)
            second, scale = encode_moment(second, signed=False)
            second_scales[i].copy_(scale)
        firsts[i].copy_(first.reshape(params[i].shape))
        seconds[i].copy_(second.reshape(params[i].shape))


def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    def run(
        params: Tensors,
        grads: Tensors,
        firsts: Tensors,
        seconds: Tensors,
        first_scales: Tensors,
        second_scales: Tensors,
        steps: list[int],
        offsets: list[int],
        numbers: list[int],
        lr: float,
        beta1: float,
        beta2: float,
        epsilon: float,
        weight_decay: float,
        grad_factor: float,
        rounding: str,
        seed: int,
    ) -> None:
        whole: list[int] = []
        of_each: list[float] = []
        held: Tensors = []  # contiguous copies, until the kernel has run
        copied: list[tuple[Tensor, Tensor]] = []

        def address(tensor: Tensor, written: bool = True) -> int:
            if tensor.is_contiguous():
                return tensor.data_ptr()
            held.append(tensor.contiguous())
            if written:
                copied.append((tensor, held[-1]))
            return held[-1].data_ptr()

        for i, pair in enumerate(factors(steps, lr, beta1, beta2)):
            param, grad = params[i], grads[i]
            whole += (address(param), address(grad, False), address(firsts[i]), address(seconds[i]))
            whole += (address(first_scales[i]), address(second_scales[i])) if first_scales else (0, 0)
            whole += shape_in_rows(param) if first_scales else (1, param.numel())
            whole += (offsets[i], stream(numbers[i], steps[i]), TYPES[param.dtype], TYPES[grad.dtype])
            of_each += pair
        decays = (1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, epsilon, seed % (1 << 64))
        function(whole, of_each, grad_factor, *decays, rounding == "stochastic", torch.get_num_threads())
        for tensor, result in copied:
            tensor.copy_(result)

    return run


table.register(
    table.Operation(
        NAME,
        describe,
        (
            table.Kernel("adamw-avx512", "avx512", _compiled(_C.adamw_avx512)),
            table.Kernel("adamw-avx2", "avx2", _compiled(_C.adamw_avx2)),
            table.Kernel("adamw-generic", "generic", _compiled(_C.adamw_generic)),
            table.Kernel("adamw-torch", table.TORCH, reference),
        ),
    )
)

LIBRARY.define(
    f"{NAME}(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] firsts, Tensor(c!)[] seconds, Tensor(d!)[] first_scales,"
    " Tensor(e!)[] second_scales, int[] steps, int[] offsets, int[] numbers, float lr, float beta1, float beta2,"
    " float epsilon, float weight_decay, float grad_factor, str rounding, int seed) -> ()"
)


def _cpu(*arguments: Any) -> None:
    check(*arguments)
    table.choose(NAME, describe(*arguments)).run(*arguments)


table.implement(NAME, check, lambda *_: None, _cpu)
_operation = torch.ops.parco.adamw.default


def _count(params: Tensors, firsts: Tensors, seconds: Tensors, first_scales: Tensors, second_scales: Tensors) -> None:
    torch.autograd.graph.increment_version([*params, *firsts, *seconds, *first_scales, *second_scales])


def _counted(keys: Any, params: Tensors, grads: Tensors, *others: Any) -> None:
    """Moves the versions of what is written, as PyTorch's own operations in place do."""
    _count(params, *others[:4])
    internals: Any = torch._C  # pyright: ignore[reportPrivateUsage]
    with internals._AutoDispatchBelowADInplaceOrView():
        _operation.redispatch(keys & internals._after_ADInplaceOrView_keyset, params, grads, *others)


LIBRARY.impl(NAME, _counted, "ADInplaceOrView", with_keyset=True)


def adamw(
    params: Tensors,
    grads: Tensors,
    firsts: Tensors,
    seconds: Tensors,
    first_scales: Tensors,
    second_scales: Tensors,
    *,
    steps: list[int],
    offsets: list[int],
    numbers: list[int],
    lr: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    grad_factor: float = 1.0,
    rounding: str = "stochastic",
    seed: int = 0,
) -> None:
    """One step of AdamW of each of `params` (fp32 or bf16, any shapes), in place.

    `grads` are fp32, bf16 or fp16, and multiplied by `grad_factor` first. The moments `firsts` and `seconds` are fp32,
    or uint8 codes under `first_scales` and `second_scales`, fp32 `scale_shape(param)`: see `states`; without such
    scales both lists are empty. `steps` count from 1. bf16 parameters are rounded to nearest, or stochastically by
    random bits that are a function of `seed`, the step, the parameter's number in `numbers` and the place of a number
    in it, counted from `offsets`, and of nothing else. What is not contiguous is copied and written back. Raises
    ValueError or TypeError naming the argument.
    """
    moments = (firsts, seconds, first_scales, second_scales)
    scalars = (lr, *betas, epsilon, weight_decay, grad_factor, rounding, signed(seed))
    if not params:
        return
    if not torch.is_inference_mode_enabled() and undispatched(*params, *grads):
        _cpu(params, grads, *moments, steps, offsets, numbers, *scalars)
        _count(params, *moments)
    else:
        _operation(params, grads, *moments, steps, offsets, numbers, *scalars)
