"""Puts parco's one-pass operations where Transformers' modules do the same in many.

Nothing is known here of single architectures. A module whose parts suggest a fusion is fused where two things hold
(`proofs`): its forward names nothing but what the fusion accounts for, and on random numbers of several magnitudes it
gives what the operation gives, within the rounding of its dtype; PyTorch's own classes (Linear, Dropout) are known by
their type. A fused module gets a subclass of its own class, under
the same name, with another forward; its parameters, children and their names stay. So state dicts, saving, hooks,
copies and the rest of the model see no difference, and what is not recognised goes on as it was.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from parco.kernels.library import TYPES, transformed, untraced
from parco.kernels.linear import linear_dense
from parco.kernels.rowwise import ACTIVATIONS, dropout, rms_norm
from parco.nn import decode, joined, layers, mixture, proofs
from parco.nn.attention import INTERFACES, OWN, Interfaces, known_in
from parco.nn.experts import is_experts
from parco.nn.linear import under_its_name
from parco.nn.parts import PROJECTIONS, gated_names, is_conv1d, is_rms_norm, rows
from parco.nn.prepared import groups
from parco.nn.proofs import ROTARY, Rms, Unlike
from parco.nn.together import keeps_its_input, standing_in

Kind = Literal["norm", "gate", "rotation", "attention", "activation", "dense", "dropout", "experts", "layer"]


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


class _Fused:
    """Of every fused module: how it was made, for those who copy it."""

    _original: type[nn.Module]
    _kind: Kind


def _is_fused(module: Any) -> bool:
    return isinstance(module, _Fused)


@torch.no_grad()
def fuse_(model: nn.Module) -> Fusion:
    """Fuse RMS norms, gated feed-forward blocks, rotary embeddings, attention (PyTorch's on a CPU, which then computes
    in tiles, forward and backward), the experts of a mixture and GELUs written out in Python, in place; and decoder
    layers made of these and of layer norms, which then decode in one call. Linear layers that stayed PyTorch's own, in
    bf16 or fp16 on a CPU, are multiplied by `linear_dense` where no gradients are asked for; the matrices of
    Transformers' Conv1D are put into memory by rows for it. Dropouts (PyTorch's own modules, of a p above 0 now) keep
    no mask while they train, and drop other numbers under a seed of PyTorch's generator than unfused ones.

    Fused results differ from unfused ones by roundings, but for which numbers are dropped: what was rounded after every
    step is computed in fp32 and rounded once. Gradients flow as before. Stored matrices that read the same input (q, k
    and v; gate and up) are put side by side in memory where they are stored alike. Modules on the meta device and those
    fused before are passed over, but for what has come apart since. Raises TypeError when `model` is no module.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found: list[tuple[str, nn.Module, Kind]] = []
    proven: dict[Any, Any] = {}
    left: dict[str, str] = {}
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for name, module in reversed(modules):  # parts before what is made of them
        if _is_fused(module):
            proven[module] = module._fusion
        if module in proven or any(p.device.type == "meta" for p in module.parameters()):
            continue
        kind = _looks_like(module)
        try:
            if kind is not None:
                proven[module] = layers.layer(module, proven) if kind == "layer" else _CHECKS[kind](module)
                found.append((name, module, kind))
        except Unlike as reason:
            left[name] = str(reason)
        except Exception as error:
            left[name] = f"{type(module).__name__} takes other inputs ({type(error).__name__})"
    fused: dict[Kind, list[str]] = {}
    for name, module, kind in reversed(found):
        module._fusion = proven[module]
        module.__class__ = _class_of(type(module), kind)
        fused.setdefault(kind, []).append(name)
    for module in model.modules():
        _join_parts(module)
    return Fusion({kind: tuple(names) for kind, names in fused.items()}, left)


def _join_parts(module: Any) -> None:
    """Puts side by side what a fused module multiplies by one matrix."""
    if isinstance(module, _Fused):
        for together in groups(module, type(module)._kind):  # pyright: ignore[reportPrivateUsage]
            joined.join_(together)


@functools.cache
def _class_of(original: type[nn.Module], kind: Kind) -> type[nn.Module]:
    """The subclass of `original` that computes in one pass."""
    if kind in ("rotation", "attention"):
        forward = _attending(original)
    elif kind == "experts":
        forward = mixture.forward(original)
    elif kind == "layer":
        forward = decode.layer_forward(original)
    else:
        forward = _guarded(_FORWARDS[kind], original)

    def reduce(self: Any, protocol: int) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name != proofs.STATE}
        return _revived, (original, kind), state

    def restore(self: Any, state: dict[str, Any]) -> None:
        original.__setstate__(self, state)  # pyright: ignore
        _join_parts(self)

    def save(self: Any, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        original._save_to_state_dict(self, destination, prefix, keep_vars)  # pyright: ignore
        if not keep_vars:
            destination[prefix + "weight"] = destination[prefix + "weight"].contiguous()  # what files take

    members: dict[str, object] = {"__reduce_ex__": reduce, "__setstate__": restore, "_kind": kind, "forward": forward}
    if kind == "dense":
        members["_save_to_state_dict"] = save
    return under_its_name(original, (_Fused, original), members)


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
    if type(module) is nn.Linear:
        return "dense" if module.weight.is_cpu and module.weight.dtype in proofs.HALVES else None
    if is_conv1d(module):
        return "dense" if module.weight.is_cpu and module.weight.dtype in TYPES else None
    if type(module) is nn.Dropout:
        return "dropout" if module.p > 0 else None
    if is_rms_norm(module):
        return "norm"
    if is_experts(module):
        return "experts"
    if gated_names(module) is not None:
        return "gate"
    if ROTARY in proofs.named_by(type(module)):
        return "rotation"
    if INTERFACES in proofs.named_by(type(module)):
        return "attention"
    if type(module).__name__ in ("NewGELUActivation", "FastGELUActivation"):
        return "activation"
    return "layer" if layers.looks_like_layer(module) else None


def _norm_forward(module: Any, x: Tensor) -> Tensor:
    """Under autocast in its dtype, to which the linear layers that read it would round it one by one."""
    weight: Tensor = module.weight
    how: Rms = module._fusion
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind)
    if x.dtype in TYPES and (weight.dtype == x.dtype or (autocast and weight.dtype == torch.float32)):
        narrow = torch.get_autocast_dtype(kind) if autocast and x.dtype == torch.float32 else None
        return rms_norm(x, weight, *how, dtype=narrow)
    return module._original.forward(module, x)


def _gate_forward(module: Any, x: Tensor) -> Tensor:
    return proofs.gated_block(module, x, module._fusion)


def _attending(original: type[nn.Module]) -> Callable[..., Any]:
    """The forward of `original`, the same code, with `rotate` under the name of its rotary embedding and `attention`
    under that of PyTorch's, and where it is plain enough with one product for q, k and v.

    The other names are those of the code's module as it is now: what is patched in there later is not seen. A graph
    has PyTorch's attention: torch.compile watches the globals of that module.
    """
    named = proofs.named_by(original)
    own: Any = original.forward
    known: dict[str, Any] = {ROTARY: proofs.rotary(own.__globals__[ROTARY])} if ROTARY in named else {}
    traced = _with_globals(own, known)
    if INTERFACES in named:
        with contextlib.suppress(Unlike):  # of a module that is fused for its rotary embedding
            known[INTERFACES] = Interfaces(own.__globals__.get(INTERFACES), own.__globals__.get(OWN))
    made = _with_globals(own, known)
    together = set(PROJECTIONS) <= named <= layers.ATTENTION_NAMES and keeps_its_input(own)

    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling():
            return traced(self, *inputs, **named)
        attending = standing_in(self, inputs[0] if inputs else named.get("hidden_states")) if together else self
        return made(attending, *inputs, **named)

    return forward


def _with_globals(function: Any, known: dict[str, Any]) -> Any:
    """The same code with other globals of the names in `known`."""
    every = {**function.__globals__, **known}
    made = types.FunctionType(function.__code__, every, function.__name__, function.__defaults__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _dense_forward(module: Any, x: Tensor) -> Tensor:
    weight: Tensor = module.weight
    plain = type(weight) is nn.Parameter and weight.is_cpu and x.dtype == weight.dtype in proofs.HALVES
    trains = torch.is_grad_enabled() and (x.requires_grad or any(each.requires_grad for each in module.parameters()))
    if not plain or trains or torch.is_autocast_enabled("cpu") or not rows(module).is_contiguous():
        return module._original.forward(module, x)
    return linear_dense(x, rows(module), module.bias)


def _attention(module: nn.Module) -> None:
    """Attention whose forward takes its function from Transformers' table."""
    known_in(proofs.own_forward(module).__globals__.get(INTERFACES))


def _dense(module: Any) -> None:
    """A linear layer whose matrix lies by rows; a Conv1D's is laid out so, under the same shape."""
    proofs.dense(module)
    if is_conv1d(module):
        if type(module.weight) is not nn.Parameter or module.weight.is_shared():
            raise Unlike("its weight is shared or no plain parameter")
        module.weight.data = module.weight.detach().t().contiguous().t()


def _dropout_forward(module: Any, x: Tensor) -> Tensor:
    drops = module.training and 0 < module.p <= 1 and not module.inplace
    # The result lies by rows; PyTorch's lies as x does, which a view may count on.
    if not drops or not untraced(x) or x.dtype not in TYPES or x.is_nested or not x.is_contiguous():
        return module._original.forward(module, x)
    return dropout(x, torch.randint(1 << 62, (1,), device="cpu"), module.p)


def _activation_forward(module: Any, x: Tensor) -> Tensor:
    return ACTIVATIONS[module._fusion](x)


_CHECKS: dict[str, Callable[[nn.Module], Any]] = {
    "norm": proofs.norm,
    "gate": proofs.gate,
    "rotation": proofs.rotation,
    "attention": _attention,
    "activation": proofs.activation,
    "dense": _dense,
    "dropout": proofs.dropout,
    "experts": mixture.experts,
}
_FORWARDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "norm": _norm_forward,
    "gate": _gate_forward,
    "activation": _activation_forward,
    "dense": _dense_forward,
    "dropout": _dropout_forward,
}
