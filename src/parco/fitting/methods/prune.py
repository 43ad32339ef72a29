"""Zeros: a matrix of which only some numbers are stored, as they are or in few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from torch import Tensor

from parco.fitting.methods.method import Made, Method, Shape, check, matrix_shape
from parco.fitting.methods.quantize import Quantize
from parco.fitting.pattern import Pattern
from parco.fitting.search import IntegerGrid
from parco.fitting.sparsegpt import Pruned, sparsegpt
from parco.fitting.statistics import Statistics
from parco.formats import Format
from parco.kernels.cast import pack
from parco.weights import Weight

Score = Literal["auto", "magnitude", "wanda", "sparsegpt"]


@final
@dataclass(frozen=True)
class Prune(Method):
    """Fewer non-zeros: what `pattern` keeps of the matrix, dense in `format`.

    pattern: "2:4"; a share of zeros, "50%", the same in every row; "block:32" (16, 32, 64), half the blocks of every
    band of rows, or "block:32:75%" for another share of zeros. score: "magnitude" |W|; "wanda" |W|·‖X_j‖₂ (arXiv
    2306.11695), where of a block the squares add up; "sparsegpt", which also makes up for what is left out
    (`fitting/sparsegpt.py`); the latter two need statistics. "auto" is sparsegpt when statistics are given, else
    magnitude. An expert that no token reached has empty statistics and is pruned by magnitude. Text: `prune(2:4)`,
    `prune(50%,score=wanda)`, `prune(block:32,format=fp16)`.
    """

    pattern: Pattern
    score: Score
    format: Format

    def __init__(self, pattern: Pattern | str, score: Score = "auto", format: Format | str = "bf16") -> None:
        found = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
        form = Format.parse(format) if isinstance(format, str) else format
        if score not in get_args(Score):
            raise ValueError(f"score must be one of {', '.join(get_args(Score))}, got {score!r}")
        if not form.is_dense:
            raise ValueError(
                f"format of Prune must be fp32, bf16 or fp16, got {form}; write prune(...)>>{form} for few bits"
            )
        for name, value in (("pattern", found), ("score", score), ("format", form)):
            object.__setattr__(self, name, value)

    def solve(self, weight: Tensor, statistics: Statistics | None, grid: IntegerGrid | None = None) -> Pruned:
        """The matrix with its zeros, before it is stored; what sparsegpt keeps is rounded to `grid` where it is
        given.
        """
        if self.needs_inputs and statistics is None:
            raise ValueError(f"{self} needs statistics of the layer's inputs; score=magnitude does without")
        seen = None if statistics is None or statistics.empty else statistics
        if seen is not None and self.score in ("auto", "sparsegpt"):
            return sparsegpt(weight, seen, self.pattern, grid)
        values = weight.detach().float()
        scores = values.square()
        if seen is not None and self.score == "wanda":
            scores *= seen.diagonal
        return Pruned(values * self.pattern.keep(scores), None)

    def __call__(self, weight: Tensor, statistics: Statistics | None = None) -> Made:
        check(weight, statistics, self)
        spec = self.spec(matrix_shape(weight))
        return spec, spec.encode(self.solve(weight, statistics).values)

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Weight:
        return self.pattern.spec(self.format, shape)

    @property
    def needs_inputs(self) -> bool:
        return self.score in ("wanda", "sparsegpt")

    @property
    def leaves_out(self) -> bool:
        return True

    @property
    def rows_apart(self) -> bool:
        return self.pattern.block == 1

    def __str__(self) -> str:
        arguments = [str(self.pattern)]
        arguments += [f"score={self.score}"] if self.score != "auto" else []
        arguments += [f"format={self.format}"] if str(self.format) != "bf16" else []
        return f"prune({','.join(arguments)})"


@final
@dataclass(frozen=True)
class QuantizedPrune(Method):
    """`prune >> quantize`: the numbers that stay, stored by `quantize`, as a dense matrix [N, kept] is.

    Under sparsegpt, integers with one scale for a row are rounded in the pass that chooses the zeros, so that later
    columns make up for both. Other formats round what stays to nearest: their scales belong to numbers that stand apart
    in the matrix. Raises ValueError where gptq is asked for and cannot be had in that pass, and for activation order,
    which that pass does not have.
    """

    prune: Prune
    quantize: Quantize

    def __post_init__(self) -> None:
        if self.quantize.solver == "actorder":
            raise ValueError(
                f"{self.prune}>>{self.quantize}: sparsegpt takes the columns as they follow one another; "
                f"{self.quantize.format} without @actorder is rounded in its pass where that can be"
            )
        if self.quantize.solver == "gptq" and not self._joint:
            raise ValueError(
                f"{self.prune}>>{self.quantize}: gptq rounds kept numbers in sparsegpt's pass, integers with one scale "
                f"for a row; {self.quantize.format}@rtn rounds them to nearest"
            )

    @property
    def _joint(self) -> bool:
        """Whether numbers are rounded in the pass that chooses the zeros."""
        grid = IntegerGrid.of(self.quantize.format)
        chosen = self.prune.score in ("auto", "sparsegpt") and self.quantize.solver != "rtn"
        return chosen and grid is not None and grid.by_row

    def __call__(self, weight: Tensor, statistics: Statistics | None = None) -> Made:
        check(weight, statistics, self)
        shape = matrix_shape(weight)
        grid = IntegerGrid.of(self.quantize.format)
        pruned = self.prune.solve(weight, statistics, grid if self._joint else None)
        if grid is None or pruned.scale is None:
            kept, where = self.prune.pattern.spec("fp32", shape).encode(pruned.values)
            return self.spec(shape), (*Quantize(self.quantize.format, "rtn")(kept)[1], where)
        scale = pruned.scale
        codes = (pruned.values / torch.where(scale == 0, 1.0, scale)).round_()
        kept, where = self.prune.pattern.spec("fp32", shape).encode(codes)
        packed = pack((kept + grid.centre).to(torch.uint8), grid.bits)
        return self.spec(shape), (packed, scale.to(grid.scale_dtype), where)

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Weight:
        return self.prune.pattern.spec(self.quantize.format, shape)

    @property
    def needs_inputs(self) -> bool:
        return self.prune.needs_inputs or self.quantize.needs_inputs

    @property
    def leaves_out(self) -> bool:
        return True

    @property
    def rows_apart(self) -> bool:
        return self.prune.rows_apart and self.quantize.rows_apart

    def __str__(self) -> str:
        return f"{self.prune}>>{self.quantize}"
