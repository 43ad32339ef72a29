"""Puts parco's one-pass operations where Transformers' modules do the same in many.

Nothing is known here of single architectures: a module whose shape suggests a fusion is asked for its result on random
numbers, and is fused where the operation gives the same within the rounding of its dtype. The modules stay, with their
names, parameters and classes; only the `forward` of the instance changes. So state dicts, saving, hooks and the rest of
the model see no difference, and what is not recognised goes on as it was.
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

from parco.kernels.library import TYPES
from parco.kernels.rowwise import ACTIVATIONS, gated, rms_norm, rotate
from parco.nn.linear import Linear

Kind = Literal["norm", "gate", "rotation", "activation"]

_ROTARY = "apply_rotary_pos_emb"


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


@torch.no_grad()
def fuse_(model: nn.Module) -> Fusion:
    """Fuse RMS norms, gated feed-forward blocks, rotary embeddings and GELUs written out in Python, in place.

    Fused results differ from unfused ones by roundings: what was rounded after every step is computed in fp32 and
    rounded once. Gradients flow as before. Modules on the meta device and those fused before are passed over. Raises
    TypeError when `model` is no module.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    fused: dict[Kind, list[str]] = {}
    left: dict[str, str] = {}
    rotations: dict[Callable[..., Any], Callable[..., Any]] = {}
    for name, module in model.named_modules():
        if "forward" in module.__dict__ or any(p.device.type == "meta" for p in module.parameters()):
            continue
        try:
            found = _norm(module) or _gate(module) or _rotation(module, rotations) or _activation(module)
        except _Unlike as reason:
            left[name] = str(reason)
            continue
        if found is not None:
            kind, module.forward = found
            fused.setdefault(kind, []).append(name)
    return Fusion({kind: tuple(names) for kind, names in fused.items()}, left)


Found = tuple[Kind, Callable[..., Any]]


def _random(*shape: int, like: Tensor, seed: int = 0) -> Tensor:
    """Normal numbers of the dtype and on the device of `like`, the same every time."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.to(like.device, like.dtype)


def _apart(found: Tensor, expected: Tensor) -> float:
    """The difference's norm over the norm expected, in roundings of the dtype."""
    size = expected.double().norm().clamp_min(1e-30)
    return float((found.double() - expected.double()).norm() / size) / torch.finfo(expected.dtype).eps


ROUNDINGS = 2.0
"""How far apart two ways to compute the same may be, in units of the dtype's epsilon and relative to the whole. The
unfused path's own roundings, a few of half a unit each, some of which cancel, stay below 1; a factor of 1.02 in bf16,
or a norm left out, is above.
"""


def _norm(module: nn.Module) -> Found | None:
    """RMS norms: the class says so, and one of the ways in use gives the module's result."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if "RMSNorm" not in type(module).__name__ or weight is None or weight.ndim != 1 or _inputs(module) != 1:
        return None
    epsilon = next((module.__dict__[n] for n in ("variance_epsilon", "eps", "epsilon") if n in module.__dict__), None)
    if not isinstance(epsilon, float) or weight.dtype not in TYPES:
        raise _Unlike(f"{type(module).__name__} without an epsilon, or computed in {weight.dtype}")
    x = _random(7, weight.shape[0], like=weight) * 3
    expected: Tensor = module(x)
    ways = [(offset, rounded) for offset in (0.0, 1.0) for rounded in (True, False)]
    distances = [_apart(rms_norm(x, weight, epsilon, *way), expected) for way in ways]
    best = min(range(len(ways)), key=lambda i: distances[i])
    if not distances[best] < ROUNDINGS or expected.dtype != x.dtype:
        raise _Unlike(f"{type(module).__name__} computes something else")
    return "norm", functools.partial(_norm_forward, module, epsilon, *ways[best])


def _norm_forward(module: nn.Module, epsilon: float, offset: float, rounded: bool, hidden_states: Tensor) -> Tensor:
    weight: Any = module.weight
    if hidden_states.dtype == weight.dtype and weight.dtype in TYPES:
        return rms_norm(hidden_states, weight, epsilon, offset, rounded)
    return type(module).forward(module, hidden_states)


def _gate(module: nn.Module) -> Found | None:
    """Gated feed-forward blocks: gate, up (or both in one) and down, and an activation."""
    children = dict(module.named_children())
    joint = "gate_up_proj" in children
    names = ("gate_up_proj", "down_proj") if joint else ("gate_proj", "up_proj", "down_proj")
    if not all(isinstance(children.get(name), nn.Linear | Linear) for name in names):
        return None
    function = next((getattr(module, n) for n in ("act_fn", "activation_fn", "act") if hasattr(module, n)), None)
    if function is None or _inputs(module) != 1:
        raise _Unlike(f"{type(module).__name__} has a gate and no activation, or takes more than one input")
    activation = _named(function)
    if activation is None:
        raise _Unlike(f"its activation is none of {', '.join(ACTIVATIONS)}")
    first: Any = children[names[0]]
    x = _random(3, first.in_features, like=torch.empty(0, dtype=first.weight.dtype, device=first.weight.device))
    run = functools.partial(_joint_forward if joint else _gate_forward, module, activation)
    distance = _apart(run(x), module(x))
    if not distance < ROUNDINGS:
        raise _Unlike(f"{type(module).__name__} computes something else than gate, up and down")
    return "gate", run


def _gate_forward(module: Any, activation: str, x: Tensor) -> Tensor:
    return module.down_proj(_product(module.gate_proj(x), module.up_proj(x), activation))


def _joint_forward(module: Any, activation: str, x: Tensor) -> Tensor:
    gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
    return module.down_proj(_product(gate, up, activation))


def _product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if gate.dtype == up.dtype and gate.dtype in TYPES:
        return gated(gate, up, activation)
    return ACTIVATIONS[activation](gate) * up


def _named(function: Callable[[Tensor], Tensor]) -> str | None:
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


def _rotation(module: nn.Module, known: dict[Callable[..., Any], Callable[..., Any]]) -> Found | None:
    """Attention whose forward calls `apply_rotary_pos_emb`: the same code, with `rotate` under that name."""
    forward: Any = type(module).forward
    code = getattr(forward, "__code__", None)
    if code is None or hasattr(forward, "__wrapped__") or _ROTARY not in code.co_names or code.co_freevars:
        return None
    original = forward.__globals__.get(_ROTARY)
    if original is None:
        return None
    if original not in known:
        known[original] = _rotary(original)
    replaced = types.FunctionType(
        code, {**forward.__globals__, _ROTARY: known[original]}, forward.__name__, forward.__defaults__
    )
    replaced.__kwdefaults__ = forward.__kwdefaults__
    return "rotation", functools.partial(replaced, module)


def _rotary(original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, by `rotate` where the arguments are those that it takes. Raises _Unlike where results differ."""
    if list(inspect.signature(original).parameters)[:4] != ["q", "k", "cos", "sin"]:
        raise _Unlike(f"its {_ROTARY} takes other arguments")
    widths = {turning for turning in (16, 12) if _turns_alike(original, turning)}
    if 16 not in widths:
        raise _Unlike(f"its {_ROTARY} turns otherwise")

    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **options: Any) -> Any:
        plain = not others and not options and q.ndim == 4 and cos.ndim == 3 and q.dtype in TYPES
        if (
            plain
            and (q.shape[-1] == cos.shape[-1] or 12 in widths)
            and q.dtype == k.dtype == cos.dtype == sin.dtype
            and q.shape[-1] == k.shape[-1]
        ):
            return rotate(q, k, cos, sin)
        return original(q, k, cos, sin, *others, **options)

    return turned


def _turns_alike(original: Callable[..., Any], turning: int) -> bool:
    """Whether `rotate` is this function on heads of 16 of which the first `turning` turn."""
    like = torch.empty(0)
    q, k = _random(2, 3, 5, 16, like=like), _random(2, 1, 5, 16, like=like, seed=1)
    cos, sin = (_random(2, 5, turning, like=like, seed=seed) for seed in (2, 3))
    try:
        expected = original(q, k, cos, sin)
        ours = rotate(q, k, cos, sin)
        return all(_apart(mine, theirs) < ROUNDINGS for mine, theirs in zip(ours, expected, strict=True))
    except (RuntimeError, ValueError, TypeError):
        return False


def _activation(module: nn.Module) -> Found | None:
    """GELUs that Transformers writes out in Python: PyTorch has the same in one operation."""
    if type(module).__name__ not in ("NewGELUActivation", "FastGELUActivation"):
        return None
    name = _named(module)
    return ("activation", ACTIVATIONS[name]) if name else None


def _inputs(module: nn.Module) -> int:
    """How many arguments the module's forward needs."""
    parameters = inspect.signature(module.forward).parameters.values()
    needed = (p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters)
    return sum(needed)
