"""Few bits, or none fewer: a matrix as it is, and every number of it in a Format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, final, get_args

import torch
from torch import Tensor

from parco.fitting.gptq import Integers, gptq, rtn
from parco.fitting.levels import gptq_levels, rtn_levels
from parco.fitting.methods.method import Made, Method, Shape, check, matrix_shape
from parco.fitting.search import IntegerGrid
from parco.fitting.statistics import Statistics
from parco.formats import DTYPE_NAMES, Format
from parco.kernels.cast import pack
from parco.weights import Dense, Quantized, Weight

Solver = Literal["auto", "rtn", "gptq", "actorder"]


@final
@dataclass(frozen=True)
class Keep(Method):
    """The matrix as it is, dense in its own dtype. Text: `keep`."""

    def __call__(self, weight: Tensor, statistics: Statistics | None = None) -> Made:
        check(weight, None, self)
        spec = self.spec(matrix_shape(weight), weight.dtype)
        return spec, cast(Dense, spec).encode(weight)

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Weight:
        if dtype not in DTYPE_NAMES:
            raise ValueError(f"dtype {dtype} cannot be kept; dense matrices are fp32, bf16 or fp16")
        return Dense(shape, DTYPE_NAMES[dtype])

    def __str__(self) -> str:
        return "keep"


@final
@dataclass(frozen=True)
class Quantize(Method):
    """Few bits: every number of the matrix in `format`, or its name. Dense formats are plain casts.

    solver: "rtn" rounds to nearest under searched scales, which the inputs' energies weight where they are known.
    "gptq" rounds column by column under the gram (`fitting/gptq.py`, and `fitting/levels.py` for what are no integers),
    "actorder" those of the largest inputs first; both need statistics. "auto" is gptq when statistics are given;
    without them it is rtn for integers, and other formats are cast by their own scale rule. An expert that no token
    reached has empty statistics and is rounded to nearest. Text: `int4:32`, `int4:32@rtn`, `nvfp4@gptq`,
    `int4:32@actorder`.
    """

    format: Format
    solver: Solver

    def __init__(self, format: Format | str, solver: Solver = "auto") -> None:
        form = Format.parse(format) if isinstance(format, str) else format
        if solver not in get_args(Solver):
            raise ValueError(f"solver must be one of {', '.join(get_args(Solver))}, got {solver!r}")
        if solver in ("gptq", "actorder") and form.is_dense:
            raise ValueError(f"solver {solver} has nothing to round in {form}, which is a plain cast: auto or rtn")
        object.__setattr__(self, "format", form)
        object.__setattr__(self, "solver", solver)

    def __call__(self, weight: Tensor, statistics: Statistics | None = None) -> Made:
        check(weight, statistics, self)
        spec = self.spec(matrix_shape(weight))
        grid = IntegerGrid.of(self.format)
        if isinstance(spec, Dense):
            return spec, spec.encode(weight)
        assert isinstance(spec, Quantized)
        seen = None if statistics is None or statistics.empty else statistics
        if self.needs_inputs and statistics is None:
            raise ValueError(f"{self} needs statistics of the layer's inputs; without them use {self.format}@rtn")
        ordered, importance = self.solver == "actorder", None if seen is None else seen.diagonal
        if grid is not None:
            if seen is None or self.solver == "rtn":
                return spec, _stored(rtn(weight, grid, importance))
            return spec, _stored(gptq(weight, seen, grid, ordered=ordered))
        if self.solver == "auto" and statistics is None:
            return spec, spec.encode(weight)
        if seen is None or self.solver == "rtn":
            return spec, rtn_levels(weight, self.format, importance)
        return spec, gptq_levels(weight, seen, self.format, ordered=ordered)

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Weight:
        return Dense(shape, self.format) if self.format.is_dense else Quantized(self.format, shape)

    @property
    def needs_inputs(self) -> bool:
        return self.solver in ("gptq", "actorder")

    @property
    def rows_apart(self) -> bool:
        return self.format.is_dense or (
            self.format.block.rows == 1 and "global_scale" not in self.format.tensors((1, 1))
        )

    def __str__(self) -> str:
        return str(self.format) if self.solver == "auto" else f"{self.format}@{self.solver}"


def _stored(solved: Integers) -> tuple[Tensor, ...]:
    """The tensors of an integer format: packed codes, scales in the stored dtype, zero points as bytes."""
    codes, scale = pack(solved.codes, solved.grid.bits), solved.scale.to(solved.grid.scale_dtype)
    return (codes, scale) if solved.zero is None else (codes, scale, solved.zero.to(torch.uint8))
