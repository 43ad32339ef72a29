"""What calibration has seen of one group of layers, and the matrices that solvers derive from it.

Everything a solver needs to know about the inputs of a linear layer is their second moment: for outputs W·x the summed
squared error of a stored Ŵ is Σ_n d_n G d_nᵀ with D = W − Ŵ and G = Σ x xᵀ. So calibration keeps one [K, K] matrix per
group of layers (q, k and v share it) instead of the inputs, and every candidate of every member reads it.

The costly derivative is a triangular root of the damped gram. It is computed once per `Statistics`, is shared by all
candidates, and takes as much memory as the gram; `release` drops it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from parco.kernels.cast import turned

DAMPING = 0.01
"""Share of the gram's mean diagonal that is added to the diagonal before it is factored (GPTQ's value)."""

_ROW_CHUNK = 4096


class Root(NamedTuple):
    """Upper triangular `factor` [K, K] float32 with factor · factorᵀ = gram + ridge · I."""

    factor: Tensor
    ridge: float


@dataclass(frozen=True, eq=False)
class Statistics:
    """Second moments of a layer's inputs over `count` tokens.

    gram: [K, K] float32 or float64, Σ x xᵀ of the inputs that the layer *will* see (not divided by `count`).
    count: tokens summed over.
    cross: [K, K] or None, Σ x_original x_seenᵀ: rows follow the original inputs, columns the inputs in `gram`. Given
    when
        the layers before this one have already changed, so that solvers aim at the original output W · x_original.
    row_energy: [N] or None, mean squared gradient of the loss with respect to each output (used by planners).
    magnitude: [K] or None, Σ |x| of every input.
    peak: [K] or None, the greatest |x| of every input.
    fisher: [K] or None, squared gradient of the loss with respect to the matrix, summed over each column.

    Raises ValueError when shapes disagree, when the count is negative or when a moment is not finite.
    """

    gram: Tensor
    count: int
    cross: Tensor | None = None
    row_energy: Tensor | None = None
    magnitude: Tensor | None = None
    fisher: Tensor | None = None
    peak: Tensor | None = None

    def __post_init__(self) -> None:
        if self.gram.ndim != 2 or self.gram.shape[0] != self.gram.shape[1]:
            raise ValueError(f"gram must be a square matrix, got shape {tuple(self.gram.shape)}")
        if self.gram.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"gram must be float32 or float64, got {self.gram.dtype}: half precision loses small moments"
            )
        if self.count < 0:
            raise ValueError(f"count must not be negative, got {self.count}")
        if self.cross is not None and self.cross.shape != self.gram.shape:
            raise ValueError(
                f"cross must have the gram's shape {tuple(self.gram.shape)}, got {tuple(self.cross.shape)}"
            )
        for name in ("gram", "cross", "row_energy", "magnitude", "fisher", "peak"):
            moment: Tensor | None = getattr(self, name)
            if moment is not None and not bool(torch.isfinite(moment.sum())):
                raise ValueError(f"{name} holds NaN or inf: the calibration inputs overflowed")

    @classmethod
    def of(cls, inputs: Tensor, original: Tensor | None = None, row_energy: Tensor | None = None) -> Statistics:
        """Statistics of inputs [..., K] as the layer sees them; `original` [..., K] are the same tokens in the
        original model.
        """
        seen = inputs.reshape(-1, inputs.shape[-1]).float()
        cross = None
        if original is not None:
            if original.shape != inputs.shape:
                raise ValueError(
                    f"original must have the inputs' shape {tuple(inputs.shape)}, got {tuple(original.shape)}"
                )
            cross = original.reshape(seen.shape).float().T @ seen
        sizes = seen.abs()
        peak = sizes.amax(0) if seen.shape[0] else sizes.new_zeros(seen.shape[1])
        return cls(seen.T @ seen, seen.shape[0], cross, row_energy, sizes.sum(0), peak=peak)

    def __add__(self, other: Statistics) -> Statistics:
        """Statistics over the tokens of both. Row energies are averaged by their counts; what only one has is left out
        of sums.
        """
        if (self.cross is None) != (other.cross is None):
            raise ValueError(
                "one of the statistics has cross moments and the other has none: they were seen in different passes"
            )
        cross = None if self.cross is None or other.cross is None else self.cross + other.cross
        count = self.count + other.count
        energy = self.row_energy
        if self.row_energy is not None and other.row_energy is not None:
            energy = (self.row_energy * self.count + other.row_energy * other.count) / max(count, 1)
        magnitude, fisher = (
            None if one is None or two is None else one + two
            for one, two in ((self.magnitude, other.magnitude), (self.fisher, other.fisher))
        )
        peak = None if self.peak is None or other.peak is None else torch.maximum(self.peak, other.peak)
        return Statistics(self.gram + other.gram, count, cross, energy, magnitude, fisher, peak)

    @property
    def columns(self) -> int:
        """K, the width of the layer's inputs."""
        return self.gram.shape[0]

    @cached_property
    def empty(self) -> bool:
        """True when nothing was seen (an expert that no token reached): solvers then act as if without statistics."""
        return self.count == 0 or not bool((self.gram.diagonal() > 0).any())

    @cached_property
    def diagonal(self) -> Tensor:
        """[K] float32: summed squares of every input."""
        return self.gram.diagonal().float()

    @cached_property
    def dead(self) -> Tensor:
        """[K] bool: inputs that were zero on every token. Solvers set their weights to zero, which frees the scales."""
        return self.diagonal <= 0

    @cached_property
    def root(self) -> Root:
        """Triangular root of the damped gram, cached.

        Float32 first; float64 when the matrix is too ill-conditioned for it; ten times the damping when that fails too.
        The factor is upper triangular with factor · factorᵀ (not factorᵀ · factor): its columns, scaled to a unit
        diagonal, are GPTQ's feedback (see gptq.py), so no inverse is ever formed.
        """
        if self.empty:
            raise ValueError("statistics without tokens have no root; check `empty` first")
        return _root(self.gram, DAMPING, (torch.float32, torch.float64))

    @cached_property
    def ordered_root(self) -> tuple[Tensor, Root]:
        """The columns in the order of their energies, the largest first, [K] int64, and `root` of the gram in that
        order. Cached.
        """
        order = torch.argsort(self.diagonal, descending=True, stable=True)
        return order, _root(self.gram[order][:, order], DAMPING, (torch.float32, torch.float64))

    @cached_property
    def exact_root(self) -> Tensor:
        """[K, K] float64, upper triangular, factor · factorᵀ = gram up to a ridge of 1e-9 of the mean diagonal (more
        only when the gram is singular to working precision). Cached: low-rank factors of tall matrices need it.
        """
        if self.empty:
            raise ValueError("statistics without tokens have no root; check `empty` first")
        return _root(self.gram, 1e-9, (torch.float64,)).factor

    @property
    def without_cross(self) -> Statistics:
        """The same inputs with nothing to aim at but the weight itself; shares what is cached."""
        return self._sharing(replace(self, cross=None))

    def with_energy(self, row_energy: Tensor | None, fisher: Tensor | None = None) -> Statistics:
        """The same inputs with what another layer's gradients were (q, k and v share their inputs); shares what is
        cached.
        """
        return self._sharing(replace(self, row_energy=row_energy, fisher=fisher))

    def _sharing(self, other: Statistics) -> Statistics:
        for name in ("root", "ordered_root", "exact_root", "diagonal", "dead", "empty"):
            if name in self.__dict__:
                other.__dict__[name] = self.__dict__[name]
        return other

    def target(self, weight: Tensor) -> Tensor:
        """The matrix that a solver should approximate under `gram`, for weight [N, K] float32: [N, K] float32.

        Without cross moments this is the weight itself. With them it is the damped least-squares solution of
        min over V of ‖W·X_original − V·X_seen‖² + ridge·‖V − W‖², that is W + W(C − G)(G + ridge·I)⁻¹: the best dense
        layer on the inputs that the already changed layers produce. It tends to W as the two inputs agree.
        """
        if self.cross is None or self.empty:
            return weight
        factor, _ = self.root
        moved = weight @ (self.cross - self.gram).float()
        moved = torch.linalg.solve_triangular(factor.T, moved, upper=False, left=False)
        moved = torch.linalg.solve_triangular(factor, moved, upper=True, left=False)
        return moved.add_(weight)

    def divided(self, scale: Tensor) -> Statistics:
        """Statistics of x / scale, for scale [K] above zero: what a matrix sees whose columns were multiplied by it."""
        each = scale.to(self.gram.dtype)
        outer = torch.outer(each, each)
        return replace(
            self,
            gram=self.gram / outer,
            cross=None if self.cross is None else self.cross / outer,
            magnitude=None if self.magnitude is None else self.magnitude / scale,
            fisher=None if self.fisher is None else self.fisher / scale.square(),
            peak=None if self.peak is None else self.peak / scale,
        )

    def turned(self, seed: int) -> Statistics:
        """Statistics of x under `parco.kernels.cast.turned`. Sizes of single inputs and columns are not known there."""

        def both(moment: Tensor) -> Tensor:
            return turned(turned(moment, seed).T, seed).T.contiguous()

        cross = None if self.cross is None else both(self.cross)
        return replace(self, gram=both(self.gram), cross=cross, magnitude=None, fisher=None, peak=None)

    def with_ridge(self, share: float) -> Statistics:
        """The same statistics with `share` of the mean diagonal added to the gram's (and the cross moment's) diagonal.

        For a matrix with a second use that has no gram, such as a head tied to an embedding: the error of the rows
        themselves then counts as well as the error of the outputs.
        """
        if share < 0:
            raise ValueError(f"share must not be negative, got {share}")
        ridge = share * float(self.diagonal.mean())
        gram = self.gram.clone()
        gram.diagonal().add_(ridge)
        cross = None if self.cross is None else self.cross.clone()
        if cross is not None:
            cross.diagonal().add_(ridge)
        return replace(self, gram=gram, cross=cross)

    def release(self) -> None:
        """Forget the cached roots, which are as large as the gram."""
        for name in ("root", "ordered_root", "exact_root"):
            self.__dict__.pop(name, None)


def _root(gram: Tensor, damping: float, dtypes: tuple[torch.dtype, ...]) -> Root:
    """Upper triangular root of gram + ridge · I in the first of `dtypes` that does; ten times the ridge when none
    does.
    """
    ridge = damping * float(gram.diagonal().double().mean())
    for _ in range(16):
        for dtype in dtypes:
            flipped = gram.to(dtype).flip(0, 1)
            flipped.diagonal().add_(ridge)
            lower, failed = torch.linalg.cholesky_ex(flipped)
            del flipped
            if int(failed) == 0:
                return Root(lower.flip(0, 1).to(dtypes[0]), ridge)
        ridge *= 10.0
    raise ValueError("gram is not positive semidefinite: it is no sum of x xᵀ")


def row_error(delta: Tensor, gram: Tensor, count: int) -> Tensor:
    """Mean squared error of every output: diag(Δ G Δᵀ) / count, [N] float32, for delta [N, K] and gram [K, K].

    Works on a few thousand rows at a time: the memory beyond the result is chunk · K. Tiny negative values that
    rounding leaves are clamped to zero.
    """
    if delta.shape[-1] != gram.shape[0]:
        raise ValueError(f"delta has {delta.shape[-1]} columns, the gram has {gram.shape[0]}")
    gram = gram.float()
    parts: list[Tensor] = []
    for start in range(0, delta.shape[0], _ROW_CHUNK):
        rows = delta[start : start + _ROW_CHUNK].float()
        parts.append((rows @ gram).mul_(rows).sum(1))
    error = torch.cat(parts) if parts else delta.new_zeros(0, dtype=torch.float32)
    return error.clamp_(min=0.0).div_(max(count, 1))
