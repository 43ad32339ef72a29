"""A matrix of which at most 2 of every 4 neighbours in a row are not zero (2:4).

Two positions of 2 bits for every 4 numbers are as many bits as a bit for each number, so the bits it is: kernels then
read it as they read a `Bitmap`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from parco.formats import Format, TensorSpec
from parco.weights.dense import Dense
from parco.weights.quantized import Quantized
from parco.weights.sparse import Masked, largest
from parco.weights.weight import check_shape

GROUP = 4
KEPT = 2


@final
@dataclass(frozen=True)
class SemiSparse(Masked):
    """2 of every 4 numbers along a row in `format`, any that a name stands for: `SemiSparse("int8:row", (1024, 4096))`.
    Tensors: those of `format` for the matrix [N, K/2] of kept numbers, then `mask` uint8 [N, ceil(K/8)], a bit for
    every number. Scales of groups are along the kept numbers. The last columns, fewer than 4 where K is no multiple of
    it, keep at most 2 as well.
    """

    format: Format
    shape: tuple[int, int]
    _kept: Dense | Quantized = field(init=False, repr=False, compare=False)
    _specs: tuple[tuple[str, TensorSpec], ...] = field(init=False, repr=False, compare=False)
    _name: str = field(init=False, repr=False, compare=False)

    def __init__(self, format: Format | str, shape: tuple[int, int]) -> None:
        check_shape(shape, "SemiSparse")
        whole, rest = divmod(shape[1], GROUP)
        self._settle_masked(format, shape, KEPT * whole + min(KEPT, rest))

    def __str__(self) -> str:
        return f"semisparse({self.format}, {self.shape[0]}x{self.shape[1]})"

    def keep(self, scores: Tensor) -> Tensor:
        self._check("keep", "scores", scores)
        rows, columns = self.shape
        padded = torch.nn.functional.pad(scores.double(), (0, -columns % GROUP), value=float("-inf"))
        return largest(padded.reshape(rows, -1, GROUP), KEPT).reshape(rows, -1)[:, :columns]

    def _excess(self, lost: Tensor, nonzero: Tensor) -> str:
        row, column = (int(index) for index in lost.nonzero()[0])
        first = column // GROUP * GROUP
        found = int(nonzero[row, first : first + GROUP].sum())
        return f"columns {first} to {first + GROUP - 1} of row {row} have {found} non-zeros and 2:4 keeps {KEPT}"
