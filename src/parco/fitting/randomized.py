"""The leading output directions of a large matrix by randomised subspace iteration, and what they leave out.

N. Halko, P.-G. Martinsson and J. A. Tropp, "Finding structure with randomness", SIAM Review 53(2), 2011, algorithm 4.4:
a random block somewhat wider than the rank is multiplied by A = W G Wᵀ and orthonormalised in turn; the eigenvectors of
A within its span are the directions. A pass costs products of W with the block alone, where all eigenvectors cost some
9N³ in float64.

Their bounds for a spectrum that falls as slowly as a language model's say little, so the error is measured instead:
what the directions leave out is tr(A) − tr(QᵀAQ), exact for any Q whatever became of the iteration, and the passes end
when another one would change it by less than `TOLERANCE`. Products are float32, sums of energies float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from parco.fitting.threads import one_thread

OVERSAMPLING = 16
"""Directions beyond the rank."""
PASSES = 8
"""At most."""
TOLERANCE = 2e-3
"""Gain of a pass, as a share of what is left out, from which on there is another one."""
SEED = 0


@dataclass(frozen=True, eq=False)
class Leading:
    """directions: [N, rank] float32, orthonormal. total: the energy of all outputs, tr(A). left_out: the part of it
    that the directions do not keep, as measured, within float32's roundings of `total`. passes: products with A.
    """

    directions: Tensor
    total: float
    left_out: float
    passes: int


def leading(target: Tensor, gram: Tensor | None, rank: int) -> Leading:
    """The leading directions of target [N, K] float32 under gram [K, K], None for the identity.

    From a fixed seed: the same directions every time. Raises ValueError for a rank that does not fit.
    """
    if not 1 <= rank <= min(target.shape):
        raise ValueError(f"rank must be in 1..{min(target.shape)} for a matrix {tuple(target.shape)}, got {rank}")
    seen = target if gram is None else target @ gram.float()
    total = float((seen * target).sum(dtype=torch.float64))
    generator = torch.Generator().manual_seed(SEED)
    width = min(rank + OVERSAMPLING, *target.shape)
    start = torch.randn(target.shape[0], width, generator=generator).to(target.device)
    with one_thread():
        image, kept, passes = seen @ (target.T @ start), 0.0, 1
        while True:
            block, _ = torch.linalg.qr(image)
            image, passes = seen @ (target.T @ block), passes + 1
            moment = (block.T @ image).double()
            energies, vectors = torch.linalg.eigh((moment + moment.T).mul_(0.5))
            gained, kept = float(energies[-rank:].sum()) - kept, float(energies[-rank:].sum())
            if passes >= PASSES or gained <= TOLERANCE * (total - kept):
                break
        directions, _ = torch.linalg.qr(block @ vectors.flip(1)[:, :rank].float())
    return Leading(directions, total, max(total - kept, 0.0), passes)
