"""Every way considered for every group, with its exact bytes and its predicted loss.

Pass 1 of the fit: each candidate is made on the original inputs and judged by the second-order prediction of
calibrate.py. Small models run the real solver for each. In large ones integer formats are rounded to nearest (their
searched scales make that cheap) and each group's predictions are multiplied by what GPTQ gains over that on one format
of the group, measured there; the chosen format is solved in full when it is applied. A candidate whose result is not
finite is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parco.fitting.calibrate import Lookups, lookups_of, statistics_of
from parco.fitting.methods import Method
from parco.fitting.observe import is_lookup
from parco.fitting.stages import Progress, Stage
from parco.fitting.statistics import Statistics, row_error
from parco.nn.blocks import Group, groups, matrix
from parco.nn.ties import tied

DEFAULT = (
    "keep",
    "int8:row",
    "int6:64",
    "int5:64",
    "int4:32",
    "int4:64",
    "int4:128",
    "int3:32",
    "int3:64",
    "int2:32",
    "factor(0.5)",
    "factor(0.5)>>int8:row",
    "factor(0.75)>>int4:64",
    "int4:64+factor(rank=16)",
)
"""Considered when no methods are named. Group sizes that a matrix's width does not divide are left out for that matrix.
"""

EXACT_PARAMETERS = 100_000_000
"""Models up to this size are judged by the real solvers."""

PROBE = "int4:64"


@dataclass(frozen=True)
class Judged:
    """One method for one group: `loss` in nats per token, `error` the relative squared error of the outputs."""

    method: str
    bytes: int
    loss: float
    error: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.error)


def parse_methods(texts: Sequence[str] | None) -> list[str]:
    """The canonical texts of the methods, "keep" always among them. Raises ValueError for one that is not known."""
    parsed = [str(Method.parse(text)) for text in (DEFAULT if texts is None else texts)]
    return list(dict.fromkeys(["keep", *parsed]))


def owners(model: nn.Module, group: Group) -> list[str]:
    """Members that hold a matrix of their own: of tied members the first."""
    held: list[str] = []
    for member in group.members:
        if not any(other in held for other in _same(model, member)):
            held.append(member)
    return held


def _same(model: nn.Module, member: str) -> tuple[str, ...]:
    return (member,) if member.endswith("]") else tied(model, member)


def considered(model: nn.Module, group: Group, methods: Sequence[str]) -> list[str]:
    """The methods that make sense for a group, "keep" first: no factors for lookups, no group longer than a row,
    nothing that is not smaller, and routers as they are."""
    shapes = [shape_of(model, member) for member in owners(model, group)]
    has_lookup = any(is_lookup(model, member) for member in group.members)
    kept = ["keep"]
    for text in methods:
        if text == "keep" or group.kind == "router":
            continue
        method = Method.parse(text)
        if has_lookup and "factor" in text:
            continue
        if any(_too_wide(text, columns) for _, columns in shapes):
            continue
        size = sum(method.spec(shape).nbytes for shape in shapes)
        if size < kept_bytes(model, group):
            kept.append(text)
    return kept


def _too_wide(text: str, columns: int) -> bool:
    """Whether a group size in the text exceeds the row: the format would then be a row scale under another name."""
    sizes = [int(part.split("@")[0].split("+")[0].split(":")[0]) for part in text.split(":")[1:] if part[:1].isdigit()]
    return any(size > columns for size in sizes)


def shape_of(model: nn.Module, member: str) -> tuple[int, int]:
    """(N, K) of a member's matrix."""
    rows, columns = matrix(model, member).shape
    return rows, columns


def kept_bytes(model: nn.Module, group: Group) -> int:
    """Bytes of the group's matrices as they are."""
    return sum(matrix(model, member).nbytes for member in owners(model, group))


def judge(
    model: nn.Module, methods: Sequence[str], parameters: int, calibrated: Stage, stage: Stage, progress: Progress
) -> dict[str, list[Judged]]:
    """Candidates of every group in the model's order. Each finished group is on disk; the unfinished are resumed."""
    every = groups(model)
    progress.stage("candidates", len(every))
    lookups = lookups_of(calibrated)
    found: dict[str, list[Judged]] = {}
    for index, group in enumerate(every):
        name = f"group-{index:04}"
        if not stage.has(name):
            texts = considered(model, group, methods)
            with torch.no_grad():
                rows = _judge_group(model, group, texts, calibrated, lookups, parameters <= EXACT_PARAMETERS)
            stage.write(name, [vars(row) for row in rows])
        found[group.name] = [Judged(**row) for row in stage.read(name)]
        progress.advance()
    stage.finish()
    return found


def _judge_group(
    model: nn.Module, group: Group, texts: list[str], calibrated: Stage, lookups: Lookups, exact: bool
) -> list[Judged]:
    statistics = statistics_of(calibrated, group)
    sums: dict[str, list[float]] = {text: [0.0, 0.0, 0.0] for text in texts}
    shapes: list[tuple[int, int]] = []
    previous: Statistics | None = None
    known = True
    for member in owners(model, group):
        weight = matrix(model, member).float().contiguous()
        shapes.append((weight.shape[0], weight.shape[1]))
        uses = _Uses.of(model, group, member, statistics, lookups)
        uses.share_root(previous)
        known = known and uses.known
        gain = 1.0 if exact else _solver_gain(weight, uses, texts)
        for text in texts[1:] if uses.known else ():
            loss, error, power = uses.cost(weight, text, exact)
            factor = gain if _proxied(text, exact) else 1.0
            for place, value in enumerate((loss * factor, error * factor, power)):
                sums[text][place] += value
        previous = uses.statistics
    rows: list[Judged] = []
    for text in texts if known else texts[:1]:
        size = (
            kept_bytes(model, group)
            if text == "keep"
            else sum(Method.parse(text).spec(shape).nbytes for shape in shapes)
        )
        loss, error, power = sums[text]
        rows.append(Judged(text, size, loss, error / power if power else 0.0))
    return [row for row in rows if row.finite]


def _proxied(text: str, exact: bool) -> bool:
    """Whether rounding to nearest stands in for the solver of this method."""
    return not exact and text.startswith("int") and "@" not in text and "+" not in text


def _solver_gain(weight: Tensor, uses: _Uses, texts: Sequence[str]) -> float:
    """Loss by GPTQ over loss by rounding, on one format of the list (at most 1)."""
    probes = [text for text in texts if _proxied(text, False)]
    if uses.statistics is None or not probes:
        return 1.0
    probe = PROBE if PROBE in probes else probes[len(probes) // 2]
    solved, _, _ = uses.cost(weight, probe, True)
    rounded, _, _ = uses.cost(weight, probe, False)
    return min(1.0, solved / rounded) if rounded > 0 and math.isfinite(solved) else 1.0


@dataclass
class _Uses:
    """How one matrix is used: it multiplies (statistics), it is looked up (lookups), or, tied, both."""

    statistics: Statistics | None
    lookups: Lookups | None

    @staticmethod
    def of(model: nn.Module, group: Group, member: str, statistics: dict[str, Statistics], lookups: Lookups) -> _Uses:
        names = [other for other in group.members if other in _same(model, member)]
        multiplied = next((statistics[name] for name in names if name in statistics), None)
        looked_up = any(is_lookup(model, name) for name in names)
        return _Uses(multiplied, lookups if looked_up else None)

    @property
    def known(self) -> bool:
        """False for a matrix that calibration saw neither multiply nor be looked up: it is kept as it is."""
        return self.statistics is not None or self.lookups is not None

    def share_root(self, previous: Statistics | None) -> None:
        """Take over the root that another member of the group has computed from the same moments."""
        if previous is not None and self.statistics is not None and previous.gram is self.statistics.gram:
            root: Any = previous.__dict__.get("root")
            if root is not None:
                self.statistics.__dict__["root"] = root

    def cost(self, weight: Tensor, text: str, exact: bool) -> tuple[float, float, float]:
        """Predicted loss (nats per token), squared error of the outputs and their power, of one method on `weight` [N,
        K].
        """
        method = Method.parse(f"{text}@rtn" if _proxied(text, exact) else text)
        spec, tensors = method(weight, self.statistics)
        delta = weight - spec.dense(*tensors)
        loss = error = power = 0.0
        if self.statistics is not None:
            gram, count = self.statistics.gram, self.statistics.count
            squares = row_error(delta, gram, count)
            energy = self.statistics.row_energy
            error, power = float(squares.sum()), float(row_error(weight, gram, count).sum())
            loss += 0.5 * float((squares * energy).sum()) if energy is not None else error
        if self.lookups is not None:
            frequency, energy = self.lookups.frequency, self.lookups.energy
            rows = frequency.shape[0]
            squares = frequency @ delta[:rows].square()
            loss += 0.5 * float((squares * energy).sum())
            error += float(squares.sum())
            power += float((frequency @ weight[:rows].square()).sum())
        return loss, error, power
