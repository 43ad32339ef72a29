"""What has to hold before a module is fused: its forward names nothing but what the fusion accounts for, and on random
numbers of several magnitudes it gives what the fusion gives. Each function here returns the settings of its fusion, or
raises Unlike.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as module_hooks

from parco.kernels.library import TYPES, transformed
from parco.kernels.rowwise import ACTIVATIONS, gated, rms_norm, rotate
from parco.nn.parts import gated_names, is_conv1d, is_linear, matrices, shape

ROTARY = "apply_rotary_pos_emb"

STATE = "_parco_state"
"""The attribute of a fused module that holds what it has found out, which copies do not take along."""

HALVES = (torch.bfloat16, torch.float16)
"""Dtypes whose products PyTorch's own layers round, or sum, as the processor likes."""

NORM_NAMES = {
    *("weight", "variance_epsilon", "eps", "epsilon", "dtype", "to", "float", "type_as", "torch", "float32"),
    *("pow", "square", "mean", "rsqrt", "sqrt", "_norm"),
}
GATE_NAMES = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "act_fn", "activation_fn", "act", "chunk"}
"""What the forward of a norm or of a gated block may name. A clamp, a dropout, a factor or a flag is none of it."""


class Rms(NamedTuple):
    """How an RMS norm is computed: the arguments of `rms_norm` but x and weight."""

    epsilon: float
    offset: float
    rounded: bool


class Centered(NamedTuple):
    """How a layer norm is computed."""

    epsilon: float


def hooked_everywhere() -> bool:
    """Whether PyTorch calls hooks of every module."""
    return bool(module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks)  # pyright: ignore


class Unlike(Exception):
    """The module looked like one that can be fused, and is not; the text says why."""


def named_by(owner: type, method: str = "forward") -> set[str]:
    """Attributes, globals and methods that a method's code names, those of a norm's `_norm` with it."""
    code = getattr(getattr(owner, method, None), "__code__", None)
    names: set[str] = set() if code is None else {*code.co_names, *code.co_freevars}
    return names | named_by(owner, "_norm") if method == "forward" and "_norm" in names else names


def require(module: nn.Module, allowed: set[str], parameters: set[str]) -> None:
    """Raise Unlike unless the module is plain: one input, nothing named but `allowed`, these parameters, no more."""
    kind = type(module).__name__
    if "forward" in module.__dict__ or getattr(type(module).forward, "__wrapped__", None) is not None:
        raise Unlike(f"the forward of this {kind} has been replaced or wrapped")
    others = named_by(type(module)) - allowed
    if others:
        raise Unlike(f"{kind} also uses {', '.join(sorted(others))}")
    inputs = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if len(inputs) != 1 or inputs[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        raise Unlike(f"{kind} takes more than one input")
    if {name for name, _ in module.named_parameters(recurse=False)} != parameters or module._buffers:  # pyright: ignore[reportPrivateUsage]
        raise Unlike(f"{kind} has other parameters than {', '.join(sorted(parameters)) or 'those of its parts'}")


def dense(module: Any) -> None:
    """Of PyTorch's own linear layer nothing has to be shown but that it is one; a Conv1D must multiply as one."""
    if "forward" in module.__dict__:
        raise Unlike(f"the forward of this {type(module).__name__} has been replaced")
    if is_conv1d(module):
        x = random(3, module.weight.shape[0], like=module.weight)
        if not alike(unfused(module), lambda x: functional.linear(x, module.weight.t(), module.bias), x) < ROUNDINGS:
            raise Unlike("Conv1D computes something else than a linear layer")


def dropout(module: Any) -> None:
    """Of PyTorch's own dropout only that nobody replaced its forward, and that it leaves its input alone."""
    if "forward" in module.__dict__ or module.inplace:
        raise Unlike("this Dropout has another forward or works in place")


ROUNDINGS = 2.0
"""How far apart two ways to compute the same may be, in units of the dtype's epsilon and relative to the whole. The
unfused path's own roundings, a few of half a unit each, some of which cancel, stay below 1.
"""
SUMMED = 8.0
"""How many times further fp32 results may be apart: products add in other orders, which 16 bits do not show."""
MAGNITUDES = (1.0, 1e-3, 50.0, 3000.0)


def random(*shape: int, like: Tensor, seed: int = 0) -> Tensor:
    """Normal numbers of the dtype and on the device of `like`, the same every time."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.to(like.device, like.dtype)


def apart(found: Tensor, expected: Tensor) -> float:
    """The difference's norm over the norm expected, in roundings of the dtype."""
    size = expected.double().norm().clamp_min(1e-30)
    return float((found.double() - expected.double()).norm() / size) / torch.finfo(expected.dtype).eps


def most_apart(roundings: float, dtype: torch.dtype) -> float:
    """How far apart results of several products may be, in roundings."""
    return roundings * (SUMMED if dtype == torch.float32 else 1)


def tells(result: Tensor) -> bool:
    """Whether others can be compared with this: it is finite, and not so small that all of it is rounding."""
    size = result.double().square().mean().sqrt()
    return bool(result.isfinite().all() and size >= torch.finfo(result.dtype).tiny)


def alike(theirs: Callable[[Tensor], Any], ours: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The greatest distance between the two over the magnitudes at which `theirs`, a module's forward, tells."""
    distances: list[float] = []
    for magnitude in MAGNITUDES:
        scaled = x * magnitude
        expected = theirs(scaled)
        if not isinstance(expected, Tensor) or expected.dtype != x.dtype:
            raise Unlike("it returns something else than a tensor of its input's dtype")
        if tells(expected) and scaled.isfinite().all():
            distances.append(apart(ours(scaled), expected))
    return max(distances, default=float("inf"))


def unfused(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module's class, without the hooks that a call runs."""
    return functools.partial(type(module).forward, module)


def norm(module: nn.Module) -> Rms:
    """How an RMS norm is computed: of the ways in use the one that gives the module's result."""
    kind = type(module).__name__
    require(module, NORM_NAMES, {"weight"})
    weight = module.get_parameter("weight")
    epsilon = next((module.__dict__[n] for n in ("variance_epsilon", "eps", "epsilon") if n in module.__dict__), None)
    if not isinstance(epsilon, float) or weight.ndim != 1 or weight.dtype not in TYPES:
        raise Unlike(f"{kind} without an epsilon, or computed in {weight.dtype}")
    x = random(7, weight.shape[0], like=weight)
    ways = [Rms(epsilon, offset, rounded) for offset in (0.0, 1.0) for rounded in (True, False)]
    distances = [alike(unfused(module), lambda x, way=way: rms_norm(x, weight, *way), x) for way in ways]
    best = min(range(len(ways)), key=lambda i: distances[i])
    if not distances[best] < ROUNDINGS:
        raise Unlike(f"{kind} computes something else")
    return ways[best]


def layer_norm(module: Any) -> Centered:
    """Of PyTorch's own layer norm only its kind has to be shown."""
    if "forward" in module.__dict__ or module.weight is None or module.weight.ndim != 1:
        raise Unlike("this LayerNorm has another forward, no weight or several dimensions")
    return Centered(module.eps)


@contextmanager
def disturbed(parameters: Iterable[nn.Parameter], size: float) -> Generator[None]:
    """Random numbers of this size added to parameters for a while, so that those of a new model tell something: weights
    of norms, which are equal, and of routers, which are so small that all experts have nearly the same weight.
    """
    held = {parameter: parameter.data for parameter in parameters}
    try:
        for seed, (parameter, data) in enumerate(held.items(), start=7):  # others than those of what is multiplied
            parameter.data = data + random(*data.shape, like=data, seed=seed) * size
        yield
    finally:
        for parameter, data in held.items():
            parameter.data = data


def gate(module: nn.Module) -> str:
    """The activation of a gated feed-forward block: gate, up (or both in one), down."""
    require(module, GATE_NAMES, set())
    return _activation_in(module, gated_block)


def plain(module: nn.Module) -> str:
    """The activation of a feed-forward block of two matrices: up and down. Dropouts are let pass where they do
    nothing.
    """
    require(module, set(dict(module.named_children())), set())
    return _activation_in(module, plain_block)


def _activation_in(module: nn.Module, block: Callable[[Any, Tensor, str], Tensor]) -> str:
    kind, multiplied = type(module).__name__, matrices(module)
    if multiplied is None or not all(is_linear(each) for each in (*multiplied[0], multiplied[1])):
        raise Unlike(f"{kind} multiplies by something else than linear layers")
    activation = activation_of(module)
    if activation is None:
        raise Unlike(f"its activation is none of {', '.join(ACTIVATIONS)}")
    weight = multiplied[0][0].weight
    x = random(3, shape(multiplied[0][0])[1], like=torch.empty(0, dtype=weight.dtype, device=weight.device))
    if not alike(unfused(module), lambda x: block(module, x, activation), x) < ROUNDINGS:
        raise Unlike(f"{kind} computes something else than {'gate, ' if gated_names(module) else ''}up and down")
    return activation


def activation_of(module: nn.Module) -> str | None:
    """The activation that a feed-forward block holds, where it is one of ours."""
    function = next((getattr(module, n) for n in ("act_fn", "activation_fn", "act") if hasattr(module, n)), None)
    return None if function is None else name_of(function)


def plain_block(module: Any, x: Tensor, activation: str) -> Tensor:
    """down(activation(up(x)))."""
    up, down = (each for each in module.children() if is_linear(each))
    return down(ACTIVATIONS[activation](up(x)))


def gated_block(module: Any, x: Tensor, activation: str) -> Tensor:
    if "gate_up_proj" in module._modules:
        gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
    else:
        gate, up = module.gate_proj(x), module.up_proj(x)
    fits = gate.dtype == up.dtype and gate.dtype in TYPES
    return module.down_proj(gated(gate, up, activation) if fits else ACTIVATIONS[activation](gate) * up)


def name_of(function: Callable[[Tensor], Tensor]) -> str | None:
    """The activation that `function` computes."""
    x = torch.linspace(-8, 8, 2049)
    try:
        y: Any = function(x)
    except Exception:  # whatever it is, it is none of ours
        return None
    for name, ours in ACTIVATIONS.items():
        if isinstance(y, Tensor) and y.shape == x.shape and (y - ours(x)).abs().max() < 2e-6:
            return name
    return None


def activation(module: nn.Module) -> str:
    """GELUs that Transformers writes out in Python: PyTorch has the same in one operation."""
    if (name := name_of(module)) is None:
        raise Unlike(f"its activation is none of {', '.join(ACTIVATIONS)}")
    return name


def rotation(module: nn.Module) -> None:
    """Attention whose forward calls `apply_rotary_pos_emb`, which is one that `rotate` computes."""
    rotary(own_forward(module).__globals__[ROTARY])


def own_forward(module: nn.Module) -> Any:
    """The forward of a module's class. Raises Unlike where its code does not stand for itself."""
    forward: Any = type(module).forward
    if "forward" in module.__dict__ or hasattr(forward, "__wrapped__") or forward.__code__.co_freevars:
        raise Unlike(f"the forward of this {type(module).__name__} has been replaced or wrapped")
    return forward


@functools.cache
def rotary(original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, by `rotate` where the arguments are those that it takes. Raises Unlike where results differ."""
    if list(inspect.signature(original).parameters)[:4] != ["q", "k", "cos", "sin"]:
        raise Unlike(f"its {ROTARY} takes other arguments")
    halved = not turns_alike(original, 16)
    if halved and not turns_alike(original, 16, halved):
        raise Unlike(f"its {ROTARY} turns otherwise")
    partly = not halved and turns_alike(original, 12)

    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **options: Any) -> Any:
        plain = not (others or options) and _turn(q, k, cos, sin)
        if plain and (cos.shape[2] == q.shape[3] or (partly and cos.shape[2] < q.shape[3])):
            return rotate(q, k, cos, sin)
        return original(q, k, cos, sin, *others, **options)

    def turned_by_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **options: Any) -> Any:
        if not (others or options) and _turn(q, k, cos, sin) and 2 * cos.shape[2] == q.shape[3]:
            return rotate(q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
        return original(q, k, cos, sin, *others, **options)

    return turned_by_halves if halved else turned


def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate` takes these, whatever part of the heads turns."""
    return (
        q.ndim == k.ndim == 4
        and cos.ndim == 3
        and cos.shape == sin.shape
        and q.shape[0] == k.shape[0]
        and q.shape[2:] == k.shape[2:]
        and cos.shape[0] in (1, q.shape[0])
        and cos.shape[1] == q.shape[2]
        and q.dtype == k.dtype
        and cos.dtype == sin.dtype
        and (cos.dtype == q.dtype or (cos.dtype == torch.float32 and torch.is_autocast_enabled(q.device.type)))
        and q.dtype in TYPES
        and not (cos.requires_grad or sin.requires_grad)
        and not transformed()
    )


@torch.no_grad()
def turns_alike(original: Callable[..., Any], turning: int, halved: bool = False) -> bool:
    """Whether `rotate` is this function on heads of 16 of which the first `turning` turn; `halved`: and which takes
    every angle once, rather than once for each half of what turns.
    """
    like = torch.empty(0)
    q, k = random(2, 3, 5, 16, like=like), random(2, 1, 5, 16, like=like, seed=1)
    cos, sin = (random(2, 5, turning // (1 + halved), like=like, seed=seed) for seed in (2, 3))
    try:
        expected = original(q, k, cos, sin)
        cos, sin = (torch.cat((each, each), -1) for each in (cos, sin)) if halved else (cos, sin)
        ours = rotate(q, k, cos, sin)
        return all(apart(mine, theirs) < ROUNDINGS for mine, theirs in zip(ours, expected, strict=True))
    except Exception:  # of other shapes, or no function of tensors
        return False
