"""The noun Method: how a dense matrix, and what was seen of its inputs, become a stored Weight.

    >>> import torch
    >>> from parco.fitting.methods import Factor, Quantize, parse
    >>> method = Factor(0.5) >> Quantize("int4:32")
    >>> str(method), parse(str(method)) == method
    ('factor(0.5)>>int4:32', True)
    >>> str(method.spec((512, 256)))
    'lowrank(quantized(int4:32, 512x80), quantized(int4:32, 80x256))'
    >>> spec, tensors = method(torch.randn(512, 256))
    >>> spec == method.spec((512, 256))
    True

A method is a value: frozen, comparable, printable, parsed back by `parse`. Its law: `method(weight, statistics)`
returns `method.spec(weight.shape)` and tensors of exactly the shapes and dtypes which that names, so bytes are known
before any work.

Methods compose as Weights do, with Python's own precedence: `a >> b` stores what a makes by b, and `a + b` adds b's
fit of what a leaves over. `int4:32+factor(rank=16)>>int8:row` is therefore a correction whose factors are int8.
"""

from __future__ import annotations

import abc
import re
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, final, get_args

import torch
from torch import Tensor

from parco.fitting.factor import factorize, rank_for, refit_left
from parco.fitting.gptq import Integers, gptq, rtn
from parco.fitting.search import IntegerGrid
from parco.fitting.statistics import Statistics, row_error
from parco.formats import DTYPE_NAMES, Format
from parco.kernels.cast import pack
from parco.weights import Dense, LowRank, Quantized, Sum, Weight

Solver = Literal["auto", "rtn", "gptq"]
Metric = Literal["auto", "plain", "activation"]
Made = tuple[Weight, tuple[Tensor, ...]]
Shape = tuple[int, int]

KNOWN = (
    "keep, a format (bf16, int8:row, int4:32, int3:64, int2:32:asym, nf4:64, fp8_e4m3:row, mxfp4, ...), "
    "format@rtn, format@gptq, factor(0.5), factor(rank=32), factor(0.5)>>int4:32, int4:32+factor(rank=16)"
)
_CORRECTION_SWEEPS = 2


class Method(abc.ABC):
    """How a matrix becomes a Weight. Subclasses are final frozen dataclasses.

    A new one is also read in `parse` and named in `KNOWN`; what it composes with is said in `__rshift__` and `__add__`.
    """

    has_factors: ClassVar[bool] = False
    """Whether the result has low-rank factors: costly to find, and no use to a matrix whose rows are looked up."""

    @abc.abstractmethod
    def __call__(self, weight: Tensor, statistics: Statistics | None = None) -> Made:
        """The spec and its tensors, in order, for `weight` [N, K] of any floating dtype (computed in float32; not
        changed).

        Raises ValueError for a weight that is no finite matrix, and where the method needs statistics and has none.
        """

    @abc.abstractmethod
    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Weight:
        """The Weight that a matrix of `shape` (N, K), of the model's `dtype`, will become."""

    @abc.abstractmethod
    def __str__(self) -> str: ...

    @property
    def rows_apart(self) -> bool:
        """Whether a row of the result depends on that row of the matrix alone, so that some rows can stand for all."""
        return not self.has_factors

    @staticmethod
    def parse(text: str | Method) -> Method:
        """The method that `text` names, as `parse` of this module."""
        return parse(text)

    def __rshift__(self, then: Method) -> Method:
        raise TypeError(
            f"{self} >> {then}: only low-rank factors are stored by a further method, as in factor(0.5)>>int4:32"
        )

    def __add__(self, other: Method) -> Method:
        raise TypeError(
            f"{self} + {other}: a correction is low-rank and follows a quantization, as in int4:32+factor(rank=16)"
        )


@final
@dataclass(frozen=True)
class Keep(Method):
    """The matrix as it is, dense in its own dtype. Text: `keep`."""

    def __call__(self, weight: Tensor, statistics: Statistics | None = None) -> Made:
        _check(weight, None, self)
        spec = self.spec(_shape(weight), weight.dtype)
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

    solver: "rtn" rounds to nearest (integers under searched scales, which the inputs' energies weight where they are
    known; other formats by their own scale rule). "gptq" rounds integers column by column under the gram
    (`fitting/gptq.py`); it needs statistics. "auto" is gptq for integers when statistics are given, else rtn. An
    expert that no token reached has empty statistics and is rounded to nearest. Text: `int4:32`, `int4:32@rtn`.
    """

    format: Format
    solver: Solver

    def __init__(self, format: Format | str, solver: Solver = "auto") -> None:
        form = Format.parse(format) if isinstance(format, str) else format
        if solver not in get_args(Solver):
            raise ValueError(f"solver must be one of {', '.join(get_args(Solver))}, got {solver!r}")
        if solver == "gptq" and IntegerGrid.of(form) is None:
            raise ValueError(f"solver gptq rounds integers with row, group or tensor scales; {form} takes auto or rtn")
        object.__setattr__(self, "format", form)
        object.__setattr__(self, "solver", solver)

    def __call__(self, weight: Tensor, statistics: Statistics | None = None) -> Made:
        _check(weight, statistics, self)
        spec = self.spec(_shape(weight))
        grid = IntegerGrid.of(self.format)
        if isinstance(spec, Dense):
            return spec, spec.encode(weight)
        assert isinstance(spec, Quantized)
        if grid is None:
            return spec, spec.encode(weight)
        seen = None if statistics is None or statistics.empty else statistics
        if self.solver == "gptq" and statistics is None:
            raise ValueError(f"{self} needs statistics of the layer's inputs; without them use {self.format}@rtn")
        if seen is None or self.solver == "rtn":
            solved = rtn(weight, grid, None if seen is None else seen.diagonal)
        else:
            solved = gptq(weight, seen, grid)
        return spec, _stored(solved)

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Weight:
        return Dense(shape, self.format) if self.format.is_dense else Quantized(self.format, shape)

    @property
    def rows_apart(self) -> bool:
        return self.format.is_dense or (
            self.format.block.rows == 1 and "global_scale" not in self.format.tensors((1, 1))
        )

    def __str__(self) -> str:
        return str(self.format) if self.solver == "auto" else f"{self.format}@{self.solver}"

    def __add__(self, other: Method) -> Method:
        if isinstance(other, Factor | QuantizedFactors):
            return Corrected(self, other)
        return super().__add__(other)


@final
@dataclass(frozen=True)
class Factor(Method):
    """Low rank: left [N, r] times right [r, K], both dense in `format`.

    Give `ratio`, the share of parameters kept, r(N + K)/(NK), from which the rank follows to the nearest multiple of
    16; or `rank` itself (at most the smaller side is taken). metric: "activation" is the optimum for the outputs on
    the inputs that were seen and needs statistics, "plain" the truncated SVD, "auto" whichever can be had.
    Text: `factor(0.5)`, `factor(rank=32)`, `factor(0.5,metric=plain,format=fp16)`.
    """

    has_factors: ClassVar[bool] = True

    ratio: float | None
    rank: int | None
    metric: Metric
    format: Format

    def __init__(
        self,
        ratio: float | None = None,
        rank: int | None = None,
        metric: Metric = "auto",
        format: Format | str = "bf16",
    ) -> None:
        form = Format.parse(format) if isinstance(format, str) else format
        if (ratio is None) == (rank is None):
            raise ValueError(f"Factor takes either ratio or rank, got ratio={ratio}, rank={rank}")
        if ratio is not None and not 0.0 < ratio <= 1.0:
            raise ValueError(f"ratio must be in (0, 1], the share of parameters kept, got {ratio}")
        if rank is not None and rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if metric not in get_args(Metric):
            raise ValueError(f"metric must be one of {', '.join(get_args(Metric))}, got {metric!r}")
        if not form.is_dense:
            raise ValueError(
                f"format of Factor must be fp32, bf16 or fp16, got {form}; write factor(...)>>{form} for few bits"
            )
        for name, value in (("ratio", ratio), ("rank", rank), ("metric", metric), ("format", form)):
            object.__setattr__(self, name, value)

    def rank_of(self, shape: Shape) -> int:
        """The rank for a matrix of `shape`."""
        return rank_for(self.ratio, shape) if self.ratio is not None else min(self.rank or 1, *shape)

    def factors(self, weight: Tensor, statistics: Statistics | None = None) -> tuple[Tensor, Tensor]:
        """(left [N, r], right [r, K]) in float32, before they are stored."""
        if self.metric == "activation" and statistics is None:
            raise ValueError(f"{self} needs statistics of the layer's inputs; metric=plain does without")
        return factorize(weight, self.rank_of(_shape(weight)), None if self.metric == "plain" else statistics)

    def __call__(self, weight: Tensor, statistics: Statistics | None = None) -> Made:
        _check(weight, statistics, self)
        left, right = self.factors(weight, statistics)
        spec = self.spec(_shape(weight))
        return spec, (left.to(self.format.dtype), right.to(self.format.dtype))

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Weight:
        rank = self.rank_of(shape)
        return LowRank(Dense((shape[0], rank), self.format), Dense((rank, shape[1]), self.format))

    def __str__(self) -> str:
        arguments = [f"{self.ratio:g}" if self.ratio is not None else f"rank={self.rank}"]
        arguments += [f"metric={self.metric}"] if self.metric != "auto" else []
        arguments += [f"format={self.format}"] if str(self.format) != "bf16" else []
        return f"factor({','.join(arguments)})"

    def __rshift__(self, then: Method) -> Method:
        return QuantizedFactors(self, then) if isinstance(then, Quantize) else super().__rshift__(then)


@final
@dataclass(frozen=True)
class QuantizedFactors(Method):
    """`factor >> quantize`: low-rank factors, each stored by `quantize`.

    `right` is rounded first, under the gram of x (its errors reach the output unchanged, as `left` is orthonormal).
    Then `left` is fitted again, by least squares, to the right factor as it is stored, and rounded under the gram of
    right · x.
    """

    has_factors: ClassVar[bool] = True

    factor: Factor
    quantize: Quantize

    def __call__(self, weight: Tensor, statistics: Statistics | None = None) -> Made:
        _check(weight, statistics, self)
        _, right = self.factor.factors(weight, statistics)
        seen = None if statistics is None or statistics.empty or self.factor.metric == "plain" else statistics
        target = weight.detach().float() if seen is None else seen.target(weight.detach().float())
        right_spec, right_tensors = self.quantize(right, None if statistics is None else statistics.without_cross)
        left, inner = refit_left(target, right_spec.dense(*right_tensors), seen)
        left_spec, left_tensors = self.quantize(left, inner)
        return LowRank(left_spec, right_spec), (*left_tensors, *right_tensors)

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Weight:
        rank = self.factor.rank_of(shape)
        return LowRank(self.quantize.spec((shape[0], rank)), self.quantize.spec((rank, shape[1])))

    def __str__(self) -> str:
        return f"{self.factor}>>{self.quantize}"


@final
@dataclass(frozen=True)
class Corrected(Method):
    """`quantize + factor`: a quantized matrix and a low-rank correction of what it leaves over.

    The two are fitted in turn, each to what the other leaves (LoftQ, arXiv 2310.08659; SVDQuant, arXiv 2411.05007),
    twice, beginning with the correction, which takes the matrix's largest directions out of the quantizer's way; the
    best state under the gram is kept.
    """

    has_factors: ClassVar[bool] = True

    quantize: Quantize
    correction: Factor | QuantizedFactors

    def __call__(self, weight: Tensor, statistics: Statistics | None = None) -> Made:
        _check(weight, statistics, self)
        target = weight.detach().float()
        if statistics is not None:
            target = statistics.target(target)
            statistics = statistics.without_cross
        low_spec, low_tensors = self.correction(target, statistics)
        best: tuple[float, tuple[Tensor, ...]] | None = None
        spec = self.spec(_shape(weight))
        for _ in range(_CORRECTION_SWEEPS):
            low = low_spec.dense(*low_tensors)
            base_spec, base_tensors = self.quantize(target - low, statistics)
            residual = target - base_spec.dense(*base_tensors)
            best = _better(best, residual - low, statistics, (*base_tensors, *low_tensors))
            low_spec, low_tensors = self.correction(residual, statistics)
            best = _better(best, residual - low_spec.dense(*low_tensors), statistics, (*base_tensors, *low_tensors))
        assert best is not None
        return spec, best[1]

    def spec(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Weight:
        return Sum(self.quantize.spec(shape), self.correction.spec(shape))

    def __str__(self) -> str:
        return f"{self.quantize}+{self.correction}"

    def __rshift__(self, then: Method) -> Method:
        if isinstance(then, Quantize) and isinstance(self.correction, Factor):
            return Corrected(self.quantize, QuantizedFactors(self.correction, then))
        return super().__rshift__(then)


def output_error(
    weight: Tensor, spec: Weight, tensors: tuple[Tensor, ...], statistics: Statistics | None = None
) -> Tensor:
    """Mean squared error of every output, [N] float32, of a stored matrix in place of `weight` [N, K].

    Per token of `statistics`; without them as for inputs of unit variance. Under shifted inputs it is the part above
    what the best dense matrix leaves (the distance to `statistics.target(weight)`).
    """
    target = weight.detach().float()
    if statistics is None or statistics.empty:
        return (target - spec.dense(*tensors)).square_().sum(1)
    return row_error(statistics.target(target) - spec.dense(*tensors), statistics.gram, statistics.count)


def parse(text: str | Method) -> Method:
    """The method that `text` names: `parse(str(m)) == m`; a Method is returned as it is. ValueError names the known
    ones.
    """
    if isinstance(text, Method):
        return text
    plain = text.strip()
    for symbol in (">>", "+"):
        parts = plain.rpartition(symbol)
        if parts[1]:
            first, second = parse(parts[0]), parse(parts[2])
            try:
                return first >> second if symbol == ">>" else first + second
            except TypeError as reason:
                raise ValueError(f"method {text!r}: {reason}") from None
    if plain == "keep":
        return Keep()
    if found := re.fullmatch(r"factor\((.*)\)", plain):
        return _parse_factor(found[1], plain)
    name, _, solver = plain.partition("@")
    try:
        form = Format.parse(name)
    except ValueError as reason:
        raise ValueError(f"method {text!r} is unknown ({reason}); known are {KNOWN}") from None
    return Quantize(form, cast(Solver, solver or "auto"))


def _parse_factor(inner: str, text: str) -> Factor:
    values: dict[str, str] = {}
    for position, argument in enumerate(inner.split(",")):
        name, given, value = (part.strip() for part in argument.partition("="))
        name, value = (name, value) if given else ("ratio" if position == 0 else "", name)
        if name not in ("ratio", "rank", "metric", "format") or name in values or not value:
            raise ValueError(f"method {text!r}: {argument.strip()!r} is no argument of factor; known are {KNOWN}")
        values[name] = value
    try:
        ratio = float(values["ratio"]) if "ratio" in values else None
        rank = int(values["rank"]) if "rank" in values else None
    except ValueError:
        raise ValueError(f"method {text!r}: ratio is a number such as 0.5 and rank a whole number such as 32") from None
    return Factor(ratio, rank, cast(Metric, values.get("metric", "auto")), values.get("format", "bf16"))


def _better(
    best: tuple[float, tuple[Tensor, ...]] | None,
    delta: Tensor,
    statistics: Statistics | None,
    tensors: tuple[Tensor, ...],
) -> tuple[float, tuple[Tensor, ...]]:
    """The state of less error: `best`, or the one that leaves `delta` [N, K] over."""
    if statistics is None or statistics.empty:
        error = float(delta.square().sum(dtype=torch.float64))
    else:
        error = float(row_error(delta, statistics.gram, statistics.count).sum(dtype=torch.float64))
    return (error, tensors) if best is None or error < best[0] else best


def _stored(solved: Integers) -> tuple[Tensor, ...]:
    """The tensors of an integer format: packed codes, scales in the stored dtype, zero points as bytes."""
    codes, scale = pack(solved.codes, solved.grid.bits), solved.scale.to(solved.grid.scale_dtype)
    return (codes, scale) if solved.zero is None else (codes, scale, solved.zero.to(torch.uint8))


def _shape(weight: Tensor) -> Shape:
    return weight.shape[0], weight.shape[1]


def _check(weight: Tensor, statistics: Statistics | None, method: Method) -> None:
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"{method}: weight must be a matrix with rows and columns, got shape {tuple(weight.shape)}")
    if not weight.dtype.is_floating_point:
        raise ValueError(f"{method}: weight must be floating point, got {weight.dtype}")
    if not bool(torch.isfinite(weight.detach().sum(dtype=torch.float32))) and not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{method}: weight holds NaN or inf")
    if statistics is not None and statistics.columns != weight.shape[1]:
        raise ValueError(f"{method}: weight has {weight.shape[1]} columns, the statistics have {statistics.columns}")
