"""Puts parco's one-pass operations where Transformers' modules do the same in many.

Nothing is known here of single architectures. A module whose parts suggest a fusion is fused where two things hold: its
forward names nothing but what the fusion accounts for, and on random numbers of several magnitudes it gives what the
operation gives, within the rounding of its dtype. A fused module gets a subclass of its own class, under the same name,
with another forward; its parameters, children and their names stay. So state dicts, saving, hooks, copies and the rest
of the model see no difference, and what is not recognised goes on as it was.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from parco.kernels.library import TYPES, transformed
from parco.kernels.rowwise import ACTIVATIONS, gated, rms_norm, rotate
from parco.nn.linear import Linear

Kind = Literal["norm", "gate", "rotation", "activation"]

_ROTARY = "apply_rotary_pos_emb"

_NORM_NAMES = {
    *("weight", "variance_epsilon", "eps", "epsilon", "dtype", "to", "float", "type_as", "torch", "float32"),
    *("pow", "square", "mean", "rsqrt", "sqrt", "_norm"),
}
_GATE_NAMES = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "act_fn", "activation_fn", "act", "chunk"}
"""What the forward of a norm or of a gated block may name. A clamp, a dropout, a factor or a flag is none of it."""


@dataclass(frozen=True)
class Fusion:
    """What `fuse_` did: names of the modules fused by kind, and name -> reason of those that looked like it and were
    left.
    """

    fused: dict[Kind, tuple[str, ...]]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{kind:<10} {len(names):>4}" for kind, names in self.fused.items()]
        lines += [f"left       {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines) or "nothing to fuse"


class _Unlike(Exception):
    """The module looked like one that can be fused, and is not; the text says why."""


class _Fused:
    """Of every fused module: how it was made, for those who copy it."""

    _original: type[nn.Module]
    _kind: Kind


@torch.no_grad()
def fuse_(model: nn.Module) -> Fusion:
    """Fuse RMS norms, gated feed-forward blocks, rotary embeddings and GELUs written out in Python, in place.

    Fused results differ from unfused ones by roundings: what was rounded after every step is computed in fp32 and
    rounded once. Gradients flow as before. Modules on the meta device and those fused before are passed over. Raises
    TypeError when `model` is no module.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found: list[tuple[str, nn.Module, Kind, Any]] = []
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, _Fused) or any(p.device.type == "meta" for p in module.parameters()):
            continue
        kind = _looks_like(module)
        try:
            if kind is not None:
                found.append((name, module, kind, _CHECKS[kind](module)))
        except _Unlike as reason:
            left[name] = str(reason)
        except Exception as error:
            left[name] = f"{type(module).__name__} takes other inputs ({type(error).__name__})"
    fused: dict[Kind, list[str]] = {}
    for name, module, kind, settings in found:
        module._fusion = settings
        module.__class__ = _class_of(type(module), kind)
        fused.setdefault(kind, []).append(name)
    return Fusion({kind: tuple(names) for kind, names in fused.items()}, left)


@functools.cache
def _class_of(original: type[nn.Module], kind: Kind) -> type[nn.Module]:
    """The subclass of `original` that computes in one pass."""
    forward = _rotated(original) if kind == "rotation" else _guarded(_FORWARDS[kind], original)

    def reduce(self: Any, protocol: int) -> Any:
        return _revived, (original, kind), self.__dict__

    return type(
        original.__name__,
        (_Fused, original),
        {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__reduce_ex__": reduce,
            "_original": original,
            "_kind": kind,
            "forward": forward,
        },
    )


def _revived(original: type[nn.Module], kind: Kind) -> nn.Module:
    """An empty fused module, which unpickling and copying fill."""
    fused = _class_of(original, kind)
    return fused.__new__(fused)


def _guarded(run: Callable[[Any, Tensor], Tensor], original: type[nn.Module]) -> Callable[..., Any]:
    """`run(module, x)` as a forward; the original's own inside torch.func's transforms and for other arguments."""

    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        values = (*inputs, *named.values())
        if len(values) != 1 or transformed():
            return original.forward(self, *inputs, **named)
        return run(self, values[0])

    return forward


def _looks_like(module: nn.Module) -> Kind | None:
    names = dict(module.named_children())
    if "RMSNorm" in type(module).__name__:
        return "norm"
    if "down_proj" in names and ("gate_up_proj" in names or {"gate_proj", "up_proj"} <= set(names)):
        return "gate"
    if _ROTARY in _named_by(type(module)):
        return "rotation"
    if type(module).__name__ in ("NewGELUActivation", "FastGELUActivation"):
        return "activation"
    return None


def _named_by(owner: type, method: str = "forward") -> set[str]:
    """Attributes, globals and methods that a method's code names, those of a norm's `_norm` with it."""
    code = getattr(getattr(owner, method, None), "__code__", None)
    names: set[str] = set() if code is None else {*code.co_names, *code.co_freevars}
    return names | _named_by(owner, "_norm") if method == "forward" and "_norm" in names else names


def _require(module: nn.Module, allowed: set[str], parameters: set[str]) -> None:
    """Raise _Unlike unless the module is plain: one input, nothing named but `allowed`, these parameters, no more."""
    kind = type(module).__name__
    if "forward" in module.__dict__ or getattr(type(module).forward, "__wrapped__", None) is not None:
        raise _Unlike(f"the forward of this {kind} has been replaced or wrapped")
    others = _named_by(type(module)) - allowed
    if others:
        raise _Unlike(f"{kind} also uses {', '.join(sorted(others))}")
    inputs = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if len(inputs) != 1 or inputs[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        raise _Unlike(f"{kind} takes more than one input")
    if {name for name, _ in module.named_parameters(recurse=False)} != parameters or module._buffers:  # pyright: ignore[reportPrivateUsage]
        raise _Unlike(f"{kind} has other parameters than {', '.join(sorted(parameters)) or 'those of its parts'}")


ROUNDINGS = 2.0
"""How far apart two ways to compute the same may be, in units of the dtype's epsilon and relative to the whole. The
unfused path's own roundings, a few of half a unit each, some of which cancel, stay below 1.
"""
MAGNITUDES = (1.0, 1e-3, 50.0, 3000.0)


def _random(*shape: int, like: Tensor, seed: int = 0) -> Tensor:
    """Normal numbers of the dtype and on the device of `like`, the same every time."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.to(like.device, like.dtype)


def _apart(found: Tensor, expected: Tensor) -> float:
    """The difference's norm over the norm expected, in roundings of the dtype."""
    size = expected.double().norm().clamp_min(1e-30)
    return float((found.double() - expected.double()).norm() / size) / torch.finfo(expected.dtype).eps


def _alike(module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The greatest distance between module and `run` over the magnitudes at which the module's result is finite."""
    distances: list[float] = []
    for magnitude in MAGNITUDES:
        scaled = x * magnitude
        expected: Any = type(module).forward(module, scaled)
        if not isinstance(expected, Tensor) or expected.dtype != x.dtype:
            raise _Unlike(f"{type(module).__name__} returns something else")
        if expected.isfinite().all() and scaled.isfinite().all():
            distances.append(_apart(run(scaled), expected) if expected.any() else float("inf"))
    return max(distances, default=float("inf"))


def _norm(module: nn.Module) -> tuple[float, float, bool]:
    """(epsilon, offset, rounded) of an RMS norm: of the ways in use the one that gives the module's result."""
    kind = type(module).__name__
    _require(module, _NORM_NAMES, {"weight"})
    weight = module.get_parameter("weight")
    epsilon = next((module.__dict__[n] for n in ("variance_epsilon", "eps", "epsilon") if n in module.__dict__), None)
    if not isinstance(epsilon, float) or weight.ndim != 1 or weight.dtype not in TYPES:
        raise _Unlike(f"{kind} without an epsilon, or computed in {weight.dtype}")
    x = _random(7, weight.shape[0], like=weight)
    ways = [(epsilon, offset, rounded) for offset in (0.0, 1.0) for rounded in (True, False)]
    distances = [_alike(module, lambda x, way=way: rms_norm(x, weight, *way), x) for way in ways]
    best = min(range(len(ways)), key=lambda i: distances[i])
    if not distances[best] < ROUNDINGS:
        raise _Unlike(f"{kind} computes something else")
    return ways[best]


def _norm_forward(module: Any, x: Tensor) -> Tensor:
    weight: Tensor = module.weight
    if x.dtype == weight.dtype and weight.dtype in TYPES:
        return rms_norm(x, weight, *module._fusion)
    return module._original.forward(module, x)


def _gate(module: nn.Module) -> str:
    """The activation of a gated feed-forward block: gate, up (or both in one), down."""
    kind, children = type(module).__name__, dict(module.named_children())
    _require(module, _GATE_NAMES, set())
    names = ("gate_up_proj", "down_proj") if "gate_up_proj" in children else ("gate_proj", "up_proj", "down_proj")
    if not all(isinstance(children[name], nn.Linear | Linear) for name in names):
        raise _Unlike(f"{kind} multiplies by something else than linear layers")
    function = next((getattr(module, n) for n in ("act_fn", "activation_fn", "act") if hasattr(module, n)), None)
    activation = None if function is None else _name_of(function)
    if activation is None:
        raise _Unlike(f"its activation is none of {', '.join(ACTIVATIONS)}")
    first: Any = children[names[0]]
    x = _random(3, first.in_features, like=torch.empty(0, dtype=first.weight.dtype, device=first.weight.device))
    if not _alike(module, lambda x: _gated_block(module, x, activation), x) < ROUNDINGS:
        raise _Unlike(f"{kind} computes something else than gate, up and down")
    return activation


def _gated_block(module: Any, x: Tensor, activation: str) -> Tensor:
    if "gate_up_proj" in module._modules:
        gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
    else:
        gate, up = module.gate_proj(x), module.up_proj(x)
    fits = gate.dtype == up.dtype and gate.dtype in TYPES
    return module.down_proj(gated(gate, up, activation) if fits else ACTIVATIONS[activation](gate) * up)


def _gate_forward(module: Any, x: Tensor) -> Tensor:
    return _gated_block(module, x, module._fusion)


def _name_of(function: Callable[[Tensor], Tensor]) -> str | None:
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


def _activation(module: nn.Module) -> str:
    """GELUs that Transformers writes out in Python: PyTorch has the same in one operation."""
    if (name := _name_of(module)) is None:
        raise _Unlike(f"its activation is none of {', '.join(ACTIVATIONS)}")
    return name


def _activation_forward(module: Any, x: Tensor) -> Tensor:
    return ACTIVATIONS[module._fusion](x)


def _rotation(module: nn.Module) -> None:
    """Attention whose forward calls `apply_rotary_pos_emb`, which is one that `rotate` computes."""
    forward: Any = type(module).forward
    if "forward" in module.__dict__ or hasattr(forward, "__wrapped__") or forward.__code__.co_freevars:
        raise _Unlike(f"the forward of this {type(module).__name__} has been replaced or wrapped")
    _rotary(forward.__globals__[_ROTARY])


def _rotated(original: type[nn.Module]) -> Callable[..., Any]:
    """The forward of `original`, the same code, with `rotate` under the name of its rotary embedding."""
    forward: Any = original.forward
    known = {**forward.__globals__, _ROTARY: _rotary(forward.__globals__[_ROTARY])}
    made = types.FunctionType(forward.__code__, known, forward.__name__, forward.__defaults__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


@functools.cache
def _rotary(original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, by `rotate` where the arguments are those that it takes. Raises _Unlike where results differ."""
    if list(inspect.signature(original).parameters)[:4] != ["q", "k", "cos", "sin"]:
        raise _Unlike(f"its {_ROTARY} takes other arguments")
    if not _turns_alike(original, 16):
        raise _Unlike(f"its {_ROTARY} turns otherwise")
    partly = _turns_alike(original, 12)

    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **options: Any) -> Any:
        plain = not others and not options and q.ndim == k.ndim == 4 and cos.ndim == 3 and cos.shape == sin.shape
        if (
            plain
            and q.shape[0] == k.shape[0]
            and q.shape[2:] == k.shape[2:]
            and cos.shape[0] in (1, q.shape[0])
            and cos.shape[1] == q.shape[2]
            and (cos.shape[2] == q.shape[3] or (partly and cos.shape[2] < q.shape[3]))
            and q.dtype == k.dtype == cos.dtype == sin.dtype
            and q.dtype in TYPES
            and not (cos.requires_grad or sin.requires_grad)
            and not transformed()
        ):
            return rotate(q, k, cos, sin)
        return original(q, k, cos, sin, *others, **options)

    return turned


@torch.no_grad()
def _turns_alike(original: Callable[..., Any], turning: int) -> bool:
    """Whether `rotate` is this function on heads of 16 of which the first `turning` turn."""
    like = torch.empty(0)
    q, k = _random(2, 3, 5, 16, like=like), _random(2, 1, 5, 16, like=like, seed=1)
    cos, sin = (_random(2, 5, turning, like=like, seed=seed) for seed in (2, 3))
    try:
        expected = original(q, k, cos, sin)
        ours = rotate(q, k, cos, sin)
        return all(_apart(mine, theirs) < ROUNDINGS for mine, theirs in zip(ours, expected, strict=True))
    except Exception:  # of other shapes, or no function of tensors
        return False


_CHECKS: dict[Kind, Callable[[nn.Module], Any]] = {
    "norm": _norm,
    "gate": _gate,
    "rotation": _rotation,
    "activation": _activation,
}
_FORWARDS: dict[Kind, Callable[[Any, Tensor], Tensor]] = {
    "norm": _norm_forward,
    "gate": _gate_forward,
    "activation": _activation_forward,
}
