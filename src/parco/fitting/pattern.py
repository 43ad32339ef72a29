"""Which numbers of a matrix may stay when others become zero: `2:4`, `50%` or `block:32`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from parco.formats import Format
from parco.weights import Bitmap, BlockSparse, SemiSparse
from parco.weights.block_sparse import BLOCKS

KNOWN = "2:4, a share of zeros such as 50%, block:16, block:32, block:64, or block:32:75% for another share than a half"
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Pattern:
    """`removed`: the share of zeros. `block`: the side of the squares that stay or go together, 1 for single numbers.
    `window`: numbers along a row of which a fixed number stays; None where it is the whole row.

    Every row (every band of blocks) keeps as much as every other, and never less than the share that is to stay.
    """

    removed: float
    block: int = 1
    window: int | None = None

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """The pattern that prints as `text`. Raises ValueError naming the known ones."""
        plain = text.strip()
        if plain == "2:4":
            return cls(0.5, window=4)
        found = re.fullmatch(r"(?:block:(\d+)(?::|$))?(?:(\d+(?:\.\d+)?)%)?", plain)
        block = int(found[1] or 1) if found else 0
        removed = float(found[2]) / 100 if found and found[2] else 0.5
        if not plain or not found or block not in (1, *BLOCKS) or not 0.0 < removed < 1.0 or plain.endswith(":"):
            raise ValueError(f"pattern {text!r} is unknown; known are {KNOWN}")
        return cls(removed, block)

    def __str__(self) -> str:
        if self.window is not None:
            return "2:4"
        share = f"{100 * self.removed:.12g}%"
        if self.block == 1:
            return share
        return f"block:{self.block}" if self.removed == 0.5 else f"block:{self.block}:{share}"

    def spec(self, format: Format | str, shape: tuple[int, int]) -> SemiSparse | Bitmap | BlockSparse:
        """The Weight that stores a matrix of `shape` (N, K) under this pattern, its numbers in `format`."""
        if self.window is not None:
            return SemiSparse(format, shape)
        return self._keeping(format, shape, self.kept(shape[1]))

    def kept(self, columns: int) -> int:
        """How many numbers (blocks, where there are any) stay in a row of so many columns."""
        return math.ceil(-(-columns // self.block) * (1.0 - self.removed) - _ROUNDING)

    def keep(self, scores: Tensor, first: int = 0) -> Tensor:
        """The bool mask [N, K] of what stays of a matrix by its `scores` [N, K], the largest: blocks by the sum of
        theirs.

        first: the scores are of the columns from there on, in a row whose earlier columns have been decided; masks of
        consecutive columns together keep what one mask would.
        """
        rows, columns = scores.shape
        if self.window is not None:
            return SemiSparse("fp32", (rows, columns)).keep(scores)
        count = self.kept(first + columns) - self.kept(first)
        if count == 0:
            return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        return self._keeping("fp32", (rows, columns), count).keep(scores)

    def _keeping(self, format: Format | str, shape: tuple[int, int], count: int) -> Bitmap | BlockSparse:
        if self.block == 1:
            return Bitmap(format, shape, count)
        return BlockSparse(format, shape, self.block, count)
