"""What a layer's call of compiled code needs (`decode`): addresses of tensors, kernels chosen, and what shows that they
are still right.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parco import _C, machine
from parco.kernels.library import PLAIN, TYPES
from parco.nn.chains import chains
from parco.nn.linear import carries_adapters, kind_of
from parco.nn.mixture import block as compiled_block
from parco.nn.mixture import mixture
from parco.nn.parts import PROJECTIONS, Block, Mixture, Parts, flagged, parts
from parco.nn.proofs import Centered, Rms, activation_of


@dataclass(frozen=True)
class Wiring:
    """In which order the parts of a layer are applied: whether the feed-forward block reads x as attention does
    (`parallel`), and whether one matrix gives query, key and value of a head, then those of the next one
    (`interleaved`), or all queries first.
    """

    parallel: bool
    interleaved: bool


@dataclass(frozen=True)
class Settings:
    """How a layer is computed: its norms and those of queries and keys, as in Parts; its wiring; the feed-forward
    block's activation, and whether the weights of chosen experts add up to 1; how many numbers of a head turn; the
    classes of the parts whose forwards are not run, before they were fused; the flags of its Parts.
    """

    norms: tuple[Rms | Centered, ...]
    of_heads: tuple[Rms | Centered, ...]
    wiring: Wiring
    activation: str
    normalized: bool
    turning: int
    softcap: float
    kinds: tuple[type, ...]
    flags: tuple[tuple[str, Any], ...]


@dataclass(frozen=True, eq=False)
class Prepared:
    """The call, None where no compiled kernels serve, and what shows that it is still right: what `owners` hold under
    `keys` are the `values`, and `tensors` lie at `addresses`. No `hooks` may be there.
    """

    call: _C.DecoderLayer | None
    dtype: torch.dtype
    columns: int
    key_heads: int
    width: int
    isa: str
    owners: tuple[dict[str, Any], ...]
    keys: tuple[str, ...]
    values: tuple[Any, ...]
    tensors: tuple[Tensor, ...]
    addresses: list[int]
    parts: tuple[nn.Module, ...]
    kinds: tuple[type, ...]
    hooks: tuple[Any, ...]
    attention: Any
    training: tuple[nn.Module, ...]
    experts: Any

    @property
    def holds(self) -> bool:
        return (
            _C.unchanged(self.owners, self.keys, self.values)
            and all(map(operator.is_, map(type, self.parts), self.kinds))
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
            and machine.isa() == self.isa
        )


def groups(module: Any, kind: str) -> Iterator[list[nn.Module]]:
    """The layers in a fused module of this kind that multiply one input."""
    if kind == "layer" and (found := parts(module)) is not None:
        yield list(found.qkv)
    elif kind == "rotation" and set(PROJECTIONS) <= module._modules.keys():
        yield [module._modules[name] for name in PROJECTIONS]
    elif kind == "gate" and "gate_proj" in module._modules:
        yield [module.gate_proj, module.up_proj]


def prepare(module: Any, settings: Settings, dtype: torch.dtype) -> Prepared:
    """What a token of `dtype` takes in this layer as it is now."""
    inside = tuple(module.modules())[1:]
    tensors = tuple(module.parameters())
    found: list[tuple[dict[str, Any], str, Any]] = [
        (module._modules, name, each) for name, each in module._modules.items()
    ]
    for part in inside:
        found += [(part._modules, name, each) for name, each in part._modules.items()]
        found += [(part._parameters, name, each) for name, each in part._parameters.items()]
        found += [(part.__dict__, name, part.__dict__.get(name)) for name in ("forward", "_packed", "_product")]
    whole = parts(module)
    call = None
    if whole is not None:
        flags = flagged(module, whole.attention, whole.block)
        found += [(owner.__dict__, name, owner.__dict__[name]) for owner, name in flags]
        replaced = any("forward" in part.__dict__ or carries_adapters(part) for part in inside)
        same = kinds(whole) == settings.kinds and whole.flags == settings.flags
        if not replaced and same and whole.fit() and activations(whole.block) == {settings.activation}:
            call = _call(settings, dtype, whole, tensors)
    owners, keys, values = zip(*found, strict=True)
    return Prepared(
        call,
        dtype,
        whole.columns if whole else 0,
        whole.heads[1] if whole else 0,
        whole.width if whole else 0,
        machine.isa(),
        owners,
        keys,
        values,
        tensors,
        [tensor.data_ptr() for tensor in tensors],
        inside,
        tuple(map(type, inside)),
        tuple(hooks for part in inside for hooks in (part._forward_hooks, part._forward_pre_hooks)),
        whole.attention if whole else None,
        whole.training if whole else (),
        whole.block.experts if whole and isinstance(whole.block, Mixture) else None,
    )


def kinds(whole: Parts) -> tuple[type, ...]:
    """The classes of the parts whose forwards are not run."""
    return tuple(map(kind_of, (whole.attention, *whole.block.modules, *whole.norms, *whole.of_heads)))


def activations(block: Block | Mixture) -> set[str | None]:
    """Those of all blocks that a token may take."""
    if isinstance(block, Block):
        return {activation_of(block.module)}
    return {activation_of(block.experts), *(set() if block.shared is None else activations(block.shared))}


def _call(settings: Settings, dtype: torch.dtype, whole: Parts, tensors: tuple[Tensor, ...]) -> _C.DecoderLayer | None:
    """The compiled layer; None where a matrix is of a kind, or somewhere, that no compiled kernel reads."""
    if dtype not in TYPES or not all(type(t) in PLAIN and t.is_cpu for t in tensors):
        return None
    (heads, key_heads), width, columns = whole.heads, whole.width, whole.columns
    products = [chains(place, dtype) for place in (whole.qkv, (whole.out,))]
    block = mixed = None
    if isinstance(whole.block, Mixture):
        mixed = mixture(whole.block, settings.activation, settings.normalized, dtype)
    else:
        block = compiled_block(whole.block, settings.activation, dtype)
    norms = [_scaling(norm, how, columns, dtype) for norm, how in zip(whole.norms, settings.norms, strict=True)]
    of_heads = [_scaling(norm, how, width, dtype) for norm, how in zip(whole.of_heads, settings.of_heads, strict=True)]
    scalings = [scaling for scaling in (*norms, *of_heads) if scaling is not None]
    if None in products or (block is None and mixed is None) or len(scalings) != len(norms) + len(of_heads):
        return None
    before, *others = scalings[: len(norms)]
    call = _C.DecoderLayer(
        isa=machine.isa(),
        columns=columns,
        heads=heads,
        key_heads=key_heads,
        head=width,
        turning=settings.turning,
        scale=whole.attention.scaling,
        softcap=settings.softcap,
        type=TYPES[dtype],
        parallel=settings.wiring.parallel,
        interleaved=settings.wiring.interleaved,
        before=before,
        between=others[1:2] if len(norms) == 4 else others,
        after=others[::2] if len(norms) == 4 else [],
        of_heads=scalings[len(norms) :],
        block=block,
        mixture=mixed,
    )
    for place, together in enumerate(products):
        for product in together or ():
            call.multiply(place, product)
    return call


def _scaling(norm: Any, how: Rms | Centered, columns: int, dtype: torch.dtype) -> _C.Scaling | None:
    """A norm of rows of so many columns; None where its weights are others."""
    bias = norm._parameters.get("bias")
    for tensor in (norm.weight, bias):
        if tensor is not None and (
            tensor.dtype != dtype or not tensor.is_contiguous() or tuple(tensor.shape) != (columns,)
        ):
            return None
    epsilon, offset, rounded = how if isinstance(how, Rms) else (how.epsilon, 0.0, False)
    address = 0 if bias is None else bias.data_ptr()
    return _C.Scaling(norm.weight.data_ptr(), address, epsilon, offset, rounded, isinstance(how, Centered))
