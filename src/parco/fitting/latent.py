"""Matrices as they are while a model is healed: differentiable, and exactly what will be stored.

A quantized matrix is a latent one, rounded in every forward pass with a straight-through gradient. Its latent value is

    latent = start + step · B A,     rank(B A) = 16,

where `start` is the original matrix moved to within half a step of what is stored, so that before the first update
rounding it gives the stored codes, and `step` is the mean step, which makes the rate mean the same at every width of
number. Scales train too, as a factor near one, and are rounded to their stored type in the forward pass; bytes and
powers of two (MX, NVFP4), too coarse for that, stay. At the end codes and scales are written back: no byte is added.
Dense leaves train as they are, rounded to their stored type in the forward pass too, and so do the kept numbers of
sparse ones, whose zeros stay where they are.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parco.fitting.scales import levels_of, written
from parco.kernels.cast import decode
from parco.kernels.cast.codes import per_element
from parco.kernels.cast.packing import pack, unpack
from parco.kernels.cast.scaling import scale_numbers
from parco.kernels.cast.tiles import block_sum
from parco.nn import StoredWeight
from parco.weights import Dense, Quantized, Sparse, Weight

RANK = 16
SNUG = 0.49
"""How close to the rounding boundary, in steps, a latent value may start that is not the nearest to the original."""
FAR = 1e6
"""How far beyond the ends of a format it may start, in its numbers: where the original is. With a gradient there, what
is clipped drags the low-rank update along (ternary to nearest: the KL after healing is 5% higher)."""


class Leaf(nn.Module):
    """A leaf of a StoredWeight under training. `value()` is the matrix [N, K] float32."""

    def value(self) -> Tensor:
        raise AssertionError("abstract")

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """What trains, by the kind that decides its rate: low_rank, scale or dense."""
        return {"dense": list(self.parameters())}

    def write_back(self) -> None:
        """Store what `value()` stands for in the StoredWeight that this leaf was made from."""


class DenseLeaf(Leaf):
    """A dense matrix, trained directly."""

    def __init__(self, stored: StoredWeight) -> None:
        super().__init__()
        self.stored = [stored]
        (values,) = stored.tensors()
        self.dtype = values.dtype
        self.values = nn.Parameter(values.detach().float())

    def value(self) -> Tensor:
        return self.values + (self.values.detach().to(self.dtype).float() - self.values.detach())

    def write_back(self) -> None:
        (values,) = self.stored[0].tensors()
        values.data = self.values.data.to(values.dtype)


class SparseLeaf(Leaf):
    """The kept numbers of a sparse matrix, dense ones, trained directly; the zeros stay where they are."""

    def __init__(self, stored: StoredWeight) -> None:
        super().__init__()
        spec = stored.spec
        assert isinstance(spec, Sparse)
        self.stored = [stored]
        self.dtype = next(iter(spec.tensors().values())).dtype
        self.values = nn.Parameter(stored.dense().detach())
        self.register_buffer("keep", self.values.detach() != 0, persistent=False)

    def value(self) -> Tensor:
        kept = self.values * self.get_buffer("keep")
        return kept + (kept.detach().to(self.dtype).float() - kept.detach())

    @torch.no_grad()
    def write_back(self) -> None:
        spec = self.stored[0].spec
        for tensor, value in zip(self.stored[0].tensors(), spec.encode(self.value()), strict=True):
            tensor.data = value


class FrozenLeaf(Leaf):
    """A leaf whose rounding is not learned here, of zeros in few bits or with zero points across rows: it stays."""

    def __init__(self, stored: StoredWeight) -> None:
        super().__init__()
        self.register_buffer("matrix", stored.dense().detach(), persistent=False)

    def value(self) -> Tensor:
        return self.get_buffer("matrix")


class RoundedLeaf(Leaf):
    """A matrix of few bits, as a latent one that is rounded."""

    def __init__(self, stored: StoredWeight) -> None:
        super().__init__()
        spec = stored.spec
        assert isinstance(spec, Quantized)
        self.stored, self.format = [stored], spec.format
        tensors = dict(zip(spec.tensors(), stored.tensors(), strict=True))
        self.scales = {name: tensor.detach().clone() for name, tensor in tensors.items() if name != "codes"}
        self.factor: nn.Parameter | None = None

    def begin(self, start: Tensor, step: float, generator: torch.Generator) -> None:
        """The latent `start` [N, K] and the mean step."""
        rows, columns = start.shape
        rank = min(RANK, rows, columns)
        self.step = step or 1.0
        self.register_buffer("start", start, persistent=False)
        self.right = nn.Parameter(torch.randn(rank, columns, generator=generator) / rank**0.5)
        self.left = nn.Parameter(torch.zeros(rows, rank))

    def latent(self) -> Tensor:
        return torch.addmm(self.get_buffer("start"), self.left, self.right, alpha=self.step)

    def scale(self) -> Tensor:
        """Scales as stored, float32 of the stored shape, with a gradient to their factors."""
        stored = self.scales["scale"]
        if self.factor is None:
            return stored.float()
        scale = stored.float() * (1.0 + self.factor)
        return scale + (scale.detach().to(stored.dtype).float() - scale.detach())

    def groups(self) -> dict[str, list[nn.Parameter]]:
        scale = [] if self.factor is None else [self.factor]
        return {"low_rank": [self.left, self.right], "scale": scale}

    def replace(self, codes: Tensor, scales: Mapping[str, Tensor]) -> None:
        """Put these into the StoredWeight."""
        spec: Any = self.stored[0].spec
        named = dict(zip(spec.tensors(), self.stored[0].tensors(), strict=True))
        named["codes"].data = codes
        for name, tensor in scales.items():
            named[name].data = tensor


class LevelLeaf(RoundedLeaf):
    """A matrix of floats, of a table, or of integers that share scales across rows: cast under the scales it has."""

    def __init__(self, stored: StoredWeight, original: Tensor | None, generator: torch.Generator) -> None:
        super().__init__(stored)
        values = stored.dense().detach()
        levels = levels_of(self.format.element).to(values.device)
        self.least, self.greatest = float(levels[0]), float(levels[-1])
        middles = (levels[1:] + levels[:-1]) / 2
        bounds = torch.cat([levels[:1] - FAR, middles, levels[-1:] + FAR])
        numbers = self._numbers()
        wide = levels.new_ones(()) if numbers is None else per_element(numbers, self.format.block, stored.spec.shape)
        start = values
        if original is not None:
            level = torch.bucketize(torch.where(wide == 0, 0.0, values / wide), middles)
            below, above = ((bound - levels)[level] * wide for bound in (bounds[:-1], bounds[1:]))
            offset = original.float() - values
            nearest = (offset > 0.9999 * below) & (offset < 0.9999 * above)
            start = values + torch.where(nearest, offset, offset.clamp(SNUG / 0.5 * below, SNUG / 0.5 * above))
        mean = 1.0 if numbers is None else float(numbers.abs().mean())
        self.begin(start, mean * float(levels.diff().mean()), generator)
        if self.format.has_free_scales:
            self.factor = nn.Parameter(torch.zeros_like(self.scales["scale"], dtype=torch.float32))

    def _numbers(self) -> Tensor | None:
        """What codes are multiplied with, with a gradient where that trains; None for formats without scales."""
        return scale_numbers(self.format, self.scales) if self.factor is None else self.scale()

    def _stored(self, numbers: Tensor | None) -> dict[str, Tensor]:
        """The scale tensors, where `numbers` are the scales as they are now."""
        if self.factor is None or numbers is None:
            return self.scales
        return self.scales | {"scale": numbers.detach().to(self.scales["scale"].dtype)}

    def value(self) -> Tensor:
        numbers = self._numbers()
        return CastThrough.apply(self.latent(), numbers, self._stored(numbers), self)  # pyright: ignore

    @torch.no_grad()
    def write_back(self) -> None:
        scales = self._stored(self._numbers())
        self.replace(written(self.latent(), self.format, scales).tensors["codes"], scales)


class CastThrough(torch.autograd.Function):
    """What a cast under given scales keeps of a latent, with a straight-through gradient: to the latent between the
    format's ends, and to the scale as if rounding were the identity (LSQ, arXiv 1902.08153)."""

    @staticmethod
    def forward(
        ctx: Any, latent: Tensor, numbers: Tensor | None, scales: Mapping[str, Tensor], leaf: LevelLeaf
    ) -> Tensor:
        value = decode(written(latent, leaf.format, scales))
        ctx.save_for_backward(latent, value, numbers)
        ctx.leaf = leaf
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        latent, value, numbers = ctx.saved_tensors
        leaf: LevelLeaf = ctx.leaf
        block = leaf.format.block
        inverse = latent.new_ones(())
        if numbers is not None:
            inverse = per_element(torch.where(numbers == 0, 0.0, 1.0 / numbers), block, tuple(latent.shape))
        exact = latent * inverse
        inside = (exact >= leaf.least) & (exact <= leaf.greatest)
        grad_numbers = None
        if numbers is not None and ctx.needs_input_grad[1]:
            grad_numbers = block_sum(grad * (value * inverse - inside * exact), block)
        return grad * inside, grad_numbers, None, None


class IntegerLeaf(RoundedLeaf):
    """An integer matrix, scaled along its rows."""

    def __init__(self, stored: StoredWeight, original: Tensor | None, generator: torch.Generator) -> None:
        super().__init__(stored)
        columns, bits = stored.spec.shape[1], self.format.bits
        self.group = min(self.format.block.columns or columns, columns)
        scale = self.scales["scale"].float()
        zero = self.scales["zero"].float() if "zero" in self.scales else torch.tensor(float(1 << (bits - 1)))
        self.lowest = 1.0 if bits == 8 and "zero" not in self.scales else 0.0
        self.highest = float((1 << bits) - 1)
        self.register_buffer("zero", zero, persistent=False)
        centre = spread(zero, self.group, columns) if zero.ndim else zero
        wide = spread(scale, self.group, columns)
        (codes, *_) = stored.tensors()
        start = (unpack(codes.detach(), bits, columns).float() - centre) * wide
        if original is not None:
            room = SNUG * wide.abs()
            start = torch.minimum(torch.maximum(original.float(), start - room), start + room)
        self.begin(start, float(scale.abs().mean()), generator)
        self.factor = nn.Parameter(torch.zeros_like(scale))

    def value(self) -> Tensor:
        return RoundThrough.apply(  # pyright: ignore
            self.latent(), self.scale(), self.get_buffer("zero"), self.group, self.lowest, self.highest
        )

    @torch.no_grad()
    def write_back(self) -> None:
        scale = self.scale()
        codes = unsigned_codes(self.latent(), scale, self.get_buffer("zero"), self.group, self.lowest, self.highest)
        self.replace(pack(codes.to(torch.uint8), self.format.bits), {"scale": scale.to(self.scales["scale"].dtype)})


def spread(per_group: Tensor, group: int, columns: int) -> Tensor:
    """[N or 1, groups] to [N or 1, columns]; a single group broadcasts."""
    if per_group.shape[-1] == 1:
        return per_group
    return per_group.repeat_interleave(group, -1)[..., :columns]


def gather(per_element: Tensor, group: int, like: Tensor) -> Tensor:
    """Sums of [N, K] over what shares an entry of `like` [N or 1, groups]: the transpose of `spread`."""
    rows, columns = per_element.shape
    groups = like.shape[-1]
    padded = nn.functional.pad(per_element, (0, groups * group - columns)) if groups * group != columns else per_element
    summed = padded.view(rows, groups, -1).sum(-1)
    return summed if like.shape[0] == rows else summed.sum(0, keepdim=True)


def unsigned_codes(latent: Tensor, scale: Tensor, zero: Tensor, group: int, lowest: float, highest: float) -> Tensor:
    """Codes [N, K] float32 in [lowest, highest]: round(latent / scale) + zero. A zero scale gives the zero point."""
    return unclamped_codes(latent, scale, zero, group).clamp_(lowest, highest)


def unclamped_codes(latent: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    columns = latent.shape[1]
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1.0 / scale)
    centre = spread(zero, group, columns) if zero.ndim else zero
    return (latent * spread(inverse, group, columns)).round_().add_(centre)


class RoundThrough(torch.autograd.Function):
    """(codes − zero) · scale with a straight-through gradient: to the latent where it is within range, and to the scale
    as if rounding were the identity (LSQ, arXiv 1902.08153)."""

    @staticmethod
    def forward(
        ctx: Any, latent: Tensor, scale: Tensor, zero: Tensor, group: int, lowest: float, highest: float
    ) -> Tensor:
        columns = latent.shape[1]
        codes = unclamped_codes(latent, scale, zero, group)
        inside = (codes >= lowest) & (codes <= highest)
        centre = spread(zero, group, columns) if zero.ndim else zero
        centred = codes.clamp_(lowest, highest).sub_(centre)
        value = centred * spread(scale, group, columns)
        ctx.save_for_backward(latent, scale, centred, inside)
        ctx.group = group
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        latent, scale, centred, inside = ctx.saved_tensors
        columns = latent.shape[1]
        inverse = torch.where(scale == 0, torch.zeros_like(scale), 1.0 / scale)
        offset = centred - inside * latent * spread(inverse, ctx.group, columns)
        grad_scale = gather(grad * offset, ctx.group, scale)
        return grad * inside, grad_scale, None, None, None, None


class Trained:
    """Leaves for every StoredWeight of a model, and the functions by which modules use them."""

    def __init__(self, generator: torch.Generator) -> None:
        self.leaves: dict[int, Leaf] = {}
        self.generator = generator

    def add(self, stored: StoredWeight, original: Tensor | None) -> None:
        """Make the leaves of `stored`. `original` [N, K] is the matrix that it stands for; parts that share in it have
        none.
        """
        if id(stored) in self.leaves:
            return
        parts = stored.spec.parts()
        if parts:
            tensors = [tensor.detach() for tensor in stored.tensors()]
            for name in parts:
                inner = None if original is None else stored.spec.inside(name, original, *tensors)
                self.add(_part(stored, name), inner)
        else:
            self.leaves[id(stored)] = self._leaf(stored, original)

    def _leaf(self, stored: StoredWeight, original: Tensor | None) -> Leaf:
        spec = stored.spec
        if isinstance(spec, Dense):
            return DenseLeaf(stored)
        if isinstance(spec, Quantized):
            if spec.format.is_plain_integer and spec.format.block.rows == 1:
                return IntegerLeaf(stored, original, self.generator)
            if not spec.format.is_asymmetric:
                return LevelLeaf(stored, original, self.generator)
        if isinstance(spec, Sparse) and spec.format.is_dense:
            return SparseLeaf(stored)
        return FrozenLeaf(stored)

    def product(self, stored: StoredWeight, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] to [..., N] through the values of the leaves."""
        return dense_like(stored.spec).apply(x, *self._values(stored), bias=bias)

    def rows(self, stored: StoredWeight, indices: Tensor) -> Tensor:
        """Rows [..., K] of the matrix."""
        return dense_like(stored.spec).lookup(indices, *self._values(stored), dtype=torch.float32)

    def _values(self, stored: StoredWeight) -> tuple[Tensor, ...]:
        names = stored.spec.parts()
        if not names:
            return (self.leaves[id(stored)].value(),)
        return sum((self._values(_part(stored, name)) for name in names), ())


@functools.lru_cache(maxsize=4096)
def dense_like(spec: Weight) -> Weight:
    """`spec` with fp32 matrices for leaves: what its formula is when nothing is rounded."""
    parts = spec.parts().values()
    return spec.with_parts(*map(dense_like, parts)) if parts else Dense(spec.shape)


def _part(stored: StoredWeight, name: str) -> StoredWeight:
    part = stored.get_submodule(name)
    assert isinstance(part, StoredWeight)
    return part
