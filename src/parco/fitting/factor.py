"""Low-rank factors of a matrix, best for the outputs on the inputs that were seen.

Of all matrices of rank r, the one with the least error tr((W − V) G (W − V)ᵀ) is U Uᵀ W, with U [N, r] the leading
eigenvectors of W G Wᵀ; the i-th component left out costs its eigenvalue σᵢ². With S Sᵀ = G that is the truncated SVD
of W S carried back through S (SVD-LLM, arXiv 2403.07378), without an inverse. G = I gives the plain SVD. When W has
more rows than columns the eigenvectors come from the smaller Sᵀ Wᵀ W S and U from a QR of W S V.

All products and the eigenvectors are float64: G spans many orders of magnitude (a few input channels of a language
model carry most of its energy), and in float32 everything below 3e-4 of the largest singular value would be noise.

`left` has orthonormal columns and `right` carries the magnitudes. For factors that are stored in few bits this is the
best split: an error of `right` reaches the output unchanged, and the columns of `left` that share a scale have equal
norms.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from parco.fitting.randomized import leading
from parco.fitting.statistics import Statistics
from parco.fitting.threads import one_thread

RANK_MULTIPLE = 16
_EXACT_SIDE = 768
ASVD_ALPHA = 0.5


def rank_for(ratio: float, shape: tuple[int, int]) -> int:
    """The rank whose factors keep `ratio` of the parameters of a matrix of `shape`: r(N + K) = ratio·N·K, rounded to
    the nearest multiple of 16, at least 16, at most the smaller side.
    """
    rows, columns = shape
    exact = ratio * rows * columns / (rows + columns)
    return min(rows, columns, max(RANK_MULTIPLE, RANK_MULTIPLE * round(exact / RANK_MULTIPLE)))


@dataclass(frozen=True, eq=False)
class Basis:
    """All output directions of one matrix, most important first.

    directions: [N, min(N, K)] float32, unit columns, orthogonal up to rounding. energies: [min(N, K)] float64, what
    leaving each one out adds to the summed squared error. target: [N, K] float32, the matrix that is factored.
    """

    directions: Tensor
    energies: Tensor
    target: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(left [N, rank] with orthonormal columns, right [rank, K]) float32: the best matrix of that rank."""
        with one_thread():
            left, _ = torch.linalg.qr(self.directions[:, :rank])
        return left, left.T @ self.target


class _Last:
    """The basis found last: candidates of one matrix differ in rank and share it. Holds no matrix alive."""

    def __init__(self) -> None:
        self.weight: weakref.ref[Tensor] | None = None
        self.version = -1
        self.statistics: weakref.ref[Statistics] | None = None
        self.basis: Basis | None = None

    def get(self, weight: Tensor, statistics: Statistics | None) -> Basis | None:
        same = self.weight is not None and self.weight() is weight and self.version == weight._version
        seen = self.statistics() if self.statistics is not None else None
        return self.basis if same and seen is statistics else None

    def put(self, weight: Tensor, statistics: Statistics | None, basis: Basis) -> None:
        self.weight = weakref.ref(weight, lambda _: self.drop())
        self.version = weight._version
        self.statistics = None if statistics is None else weakref.ref(statistics, lambda _: self.drop())
        self.basis = basis

    def drop(self) -> None:
        self.weight = self.statistics = self.basis = None


_last = _Last()


def factorize(weight: Tensor, rank: int, statistics: Statistics | None = None) -> tuple[Tensor, Tensor]:
    """(left [N, rank], right [rank, K]) float32 of weight [N, K]: the best product under the gram of `statistics`,
    aiming at `statistics.target(weight)`; without statistics (or with empty ones) the truncated SVD.

    Exact through all eigenvectors, which are kept for the next rank of the same tensor object. For a rank of at most an
    eighth of a large matrix's smaller side, where that takes a fraction of the time, by randomised subspace iteration
    (`fitting/randomized.py`), whose error is measured pass by pass and ends within a few tenths of a percent of the
    optimum. Raises ValueError when the rank does not fit or the widths differ.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(
            f"rank must be in 1..{min(weight.shape)} for a matrix of shape {tuple(weight.shape)}, got {rank}"
        )
    if statistics is not None and statistics.columns != weight.shape[1]:
        raise ValueError(f"weight has {weight.shape[1]} columns, the statistics have {statistics.columns}")
    seen = None if statistics is None or statistics.empty else statistics
    known = _last.get(weight, seen)
    if known is None and min(weight.shape) > _EXACT_SIDE and 8 * rank <= min(weight.shape):
        target = weight.detach().float() if seen is None else seen.target(weight.detach().float())
        left = leading(target, None if seen is None else seen.gram, rank).directions
        return left, left.T @ target
    return (known or basis(weight, seen)).factors(rank)


def basis(weight: Tensor, statistics: Statistics | None) -> Basis:
    """All directions of `weight` [N, K], exactly: one symmetric eigenproblem of the smaller side."""
    target = weight.detach().float()
    if statistics is not None:
        target = statistics.target(target)
    rows, columns = target.shape
    wide = target.double()
    if rows <= columns:
        moment = wide @ wide.T if statistics is None else (wide @ statistics.gram.double()) @ wide.T
        energies, vectors = _eigenvectors(moment)
        directions = vectors
    else:
        mapped = wide if statistics is None else wide @ statistics.exact_root
        energies, vectors = _eigenvectors(mapped.T @ mapped)
        directions = mapped @ vectors
        directions /= directions.norm(dim=0).clamp_(min=torch.finfo(torch.float64).tiny)
    found = Basis(directions.float(), energies, target)
    _last.put(weight, statistics, found)
    return found


def _eigenvectors(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, greatest first and not below zero, and eigenvectors (columns) of a symmetric matrix."""
    with one_thread():
        energies, vectors = torch.linalg.eigh((moment + moment.T).mul_(0.5))
    return energies.flip(0).clamp_(min=0.0), vectors.flip(1)


def fisher_factors(weight: Tensor, rank: int, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """FWSVD (arXiv 2207.00112): the truncated SVD of W D carried back, D the square roots of the Fisher information
    summed over all that reads an input (a row of the paper's matrix, which multiplies from the right, and a column of
    this one). left [N, rank], right [rank, K] float32. Raises ValueError where the statistics hold none.
    """
    if statistics.fisher is None:
        raise ValueError("the statistics hold no Fisher information, which comes from gradients: calibrate gives it")
    importance = _above_zero(statistics.fisher.float().sqrt())
    left, right = factorize(weight.detach().float() * importance, rank)
    return left, right / importance


def scaled_factors(weight: Tensor, rank: int, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """ASVD (arXiv 2312.05821): the truncated SVD of W S carried back, S_j = (mean |x_j|)^α with α = 0.5. left [N,
    rank], right [rank, K] float32. Raises ValueError where the statistics hold no magnitudes.
    """
    if statistics.magnitude is None:
        raise ValueError("the statistics hold no magnitudes of the inputs: Statistics.of and calibrate give them")
    scale = _above_zero((statistics.magnitude.float() / max(statistics.count, 1)) ** ASVD_ALPHA)
    left, right = factorize(weight.detach().float() * scale, rank)
    return left, right / scale


def _above_zero(scale: Tensor) -> Tensor:
    """No factor below a millionth of the greatest, so that it can be divided by; ones where all are zero."""
    greatest = scale.max()
    return scale.clamp(min=1e-6 * float(greatest)) if greatest > 0 else torch.ones_like(scale)


def refit_left(target: Tensor, right: Tensor, statistics: Statistics | None) -> tuple[Tensor, Statistics]:
    """The best `left` [N, r] for a given `right` [r, K] (that has been rounded, say), and the statistics of right · x.

    Least squares: left = W G Rᵀ (R G Rᵀ)⁻¹, with a ridge of 1e-7 of the mean diagonal. Without statistics G = I.
    """
    narrow = right.double()
    spread = narrow if statistics is None else narrow @ statistics.gram.double()
    moment = spread @ narrow.T
    moment = (moment + moment.T).mul_(0.5)
    damped = moment.clone()
    damped.diagonal().add_(1e-7 * float(moment.diagonal().mean()) + torch.finfo(torch.float64).tiny)
    lower = torch.linalg.cholesky(damped)
    left = torch.cholesky_solve((target.double() @ spread.T).T, lower).T
    return left.float().contiguous(), Statistics(moment.float(), 1 if statistics is None else statistics.count)
