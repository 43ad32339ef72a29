"""Scale search for formats whose numbers are floats or a table, and for blocks of several rows; search.py's is for
integers along rows.

A format's own rule maps the greatest magnitude of a block to the greatest number (ternary: the mean to one). That block
often errs less with its extreme clipped, or mapped to a smaller number where levels lie closer to the rest of the block
(NVFP4: to 4 instead of 6, arXiv 2512.02010). Scales beside the rule's are tried: powers of two one step up and down,
e4m3 scales by their code, others by multiples and by the least-squares scale of the best; what is judged is what would
be stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from parco.formats import (
    E4M3,
    Element,
    Format,
    Integer,
    ScaleAbsmax,
    ScaleAbsmean,
    ScaleDelayed,
    ScaleE4M3,
    ScaleE8M0,
    ScaleRange,
    Unscaled,
)
from parco.kernels.cast import Encoded, decode, encode
from parco.kernels.cast.decoding import element_values
from parco.kernels.cast.tiles import block_sum, scale_rows

MULTIPLES = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.15, 1.3, 1.5, 1.75, 2.0)
"""Of the rule's scale. Clipping takes those below one; a ternary block wants up to twice the mean."""
STEPS_E4M3 = (-4, -3, -2, -1, 1, 2, 3, 4, 5)
"""Of the code of an e4m3 scale: about 0.7 to 1.6 times the scale."""
PASS_ELEMENTS = 1 << 20
"""Elements searched at once, so that the few temporaries stay small beside the matrix."""


def searched(x: Tensor, format: Format, importance_K: Tensor | None = None) -> dict[str, Tensor]:
    """The scale tensors for `x` [N, K] under which Σ importance · (x − stored)² of each block is the least found, as
    stored; never more than under the format's own scales. `importance_K` [K] are the columns' weights, None for ones.

    Raises ValueError for delayed scales, which come from elsewhere.
    """
    x = x.detach().float()
    found = {name: tensor for name, tensor in encode(x, format).tensors.items() if name != "codes"}
    if "scale" not in found:
        return found
    best, height = torch.empty_like(found["scale"]), format.block.rows
    step = len(x) if height is None else max(1, PASS_ELEMENTS // (x.shape[1] * height)) * height
    for first in range(0, len(x), step):
        blocks = scale_rows(range(first, min(first + step, len(x))), format.block)
        own = {name: tensor if name == "global_scale" else tensor[blocks] for name, tensor in found.items()}
        best[blocks] = _best(x[first : first + step], format, own, importance_K)
    return found | {"scale": best}


def _best(x: Tensor, format: Format, found: Mapping[str, Tensor], importance_K: Tensor | None) -> Tensor:
    """The best scale of each block, as stored; `found` are the scales of the format's own rule."""

    def judged(scale: Tensor) -> tuple[Tensor, Tensor]:
        stored = decode(written(x, format, {**found, "scale": scale}))
        residual = (x - stored).square_()
        return stored, block_sum(residual if importance_K is None else residual * importance_K, format.block)

    best = found["scale"]
    _, error = judged(best)
    for scale in _beside(best, format):
        _, own = judged(scale)
        best, error = torch.where(own < error, scale, best), torch.where(own < error, own, error)
    if format.has_free_scales:
        stored, _ = judged(best)
        weighed = stored if importance_K is None else stored * importance_K
        above, below = block_sum(weighed * x, format.block), block_sum(weighed * stored, format.block)
        scale = torch.where(below > 0, best.float() * above / below, best.float()).to(best.dtype)
        _, own = judged(scale)
        best = torch.where(own < error, scale, best)
    return best


def levels_of(element: Element) -> Tensor:
    """The numbers that casts write, before their scale, ascending; some codes of integers and floats stand for none."""
    levels = element_values(element)
    levels = levels[levels.isfinite()].unique()
    if isinstance(element, Integer):
        return levels[(levels >= element.least) & (levels <= element.greatest)]
    return levels


def written(x: Tensor, format: Format, scales: Mapping[str, Tensor]) -> Encoded:
    """`x` [N, K] to nearest under `scales`."""
    scale, zero, global_scale = map(scales.get, ("scale", "zero", "global_scale"))
    return encode(x, format, scale=scale, zero=zero, global_scale=global_scale)


def _beside(scale: Tensor, format: Format) -> Iterator[Tensor]:
    """Other scales of the same shape and dtype, all valid."""
    match format.scale:
        case ScaleE8M0():
            for step in (-1, 1):
                yield (scale.int() + step).clamp(0, 254).to(torch.uint8)
        case ScaleE4M3():
            assert E4M3.nan_code is not None
            for step in STEPS_E4M3:
                moved = (scale.int() + step).clamp(1, E4M3.nan_code - 1).to(torch.uint8)
                yield torch.where(scale == 0, scale, moved)
        case ScaleAbsmax() | ScaleAbsmean() | ScaleRange():
            limit = torch.finfo(scale.dtype).max
            for multiple in MULTIPLES if format.has_free_scales else (0.5, 2.0):
                yield (scale.float() * multiple).clamp(max=limit).to(scale.dtype)
        case Unscaled() | ScaleDelayed():
            return
