"""A matrix with zeros anywhere, as many kept numbers in every row: what Wanda chooses, which compares within a row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from parco.formats import Format, TensorSpec
from parco.weights.dense import Dense
from parco.weights.quantized import Quantized
from parco.weights.sparse import Masked, largest
from parco.weights.weight import check_shape


@final
@dataclass(frozen=True)
class Bitmap(Masked):
    """`kept` numbers of every row in `format`, any that a name stands for: `Bitmap("int8:row", (1024, 4096), 2048)`.
    Tensors: those of `format` for a matrix [N, kept], then `mask` uint8 [N, ceil(K/8)], a bit for every number. Scales
    of groups are along the kept numbers.
    """

    format: Format
    shape: tuple[int, int]
    kept: int
    _kept: Dense | Quantized = field(init=False, repr=False, compare=False)
    _specs: tuple[tuple[str, TensorSpec], ...] = field(init=False, repr=False, compare=False)
    _name: str = field(init=False, repr=False, compare=False)

    def __init__(self, format: Format | str, shape: tuple[int, int], kept: int) -> None:
        check_shape(shape, "Bitmap")
        if not 1 <= kept <= shape[1]:
            raise ValueError(f"Bitmap: kept is {kept}; a row of {shape[1]} keeps 1 to {shape[1]} numbers")
        object.__setattr__(self, "kept", kept)
        self._settle_masked(format, shape, kept)

    def __str__(self) -> str:
        return f"bitmap({self.format}, {self.shape[0]}x{self.shape[1]}, {self.kept})"

    def keep(self, scores: Tensor) -> Tensor:
        self._check("keep", "scores", scores)
        return largest(scores, self.kept)

    def _excess(self, lost: Tensor, nonzero: Tensor) -> str:
        counts = nonzero.sum(1)
        row = int(counts.argmax())
        return f"row {row} has {int(counts[row])} non-zeros and this Weight keeps {self.kept} of each row"
