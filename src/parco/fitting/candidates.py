"""Every way considered for every group, with its exact bytes and its predicted loss.

Pass 1 of the fit: each candidate is made by its real solver on the original inputs and judged by the second-order
prediction of calibrate.py. Most methods store each row by itself, so of tall matrices evenly spaced rows stand for all:
the prediction is a sum over thousands of rows, and a sample of it is far more exact than the prediction itself. In
large models factors are left out where their decomposition would take minutes per matrix. A candidate whose result is
not finite is dropped.
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
from parco.fitting.size import group_bytes, method_for, owners, same, shape_of
from parco.fitting.stages import Progress, Stage
from parco.fitting.statistics import Statistics, row_error
from parco.nn.blocks import Group, groups, matrix
from parco.weights import Quantized, Weight

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
    "ternary:row",
    "prune(50%)>>int4:row",
    "factor(0.5)",
    "factor(0.5)>>int8:row",
    "factor(0.75)>>int4:64",
    "int4:64+factor(rank=16)",
)
"""Considered when no methods are named. Group sizes above a matrix's width are left out for that matrix."""

LARGE = 100_000_000
"""Parameters from which on a model is judged on fewer rows, and without factors of wide matrices."""

ROWS = (2048, 512)
"""Rows that stand for a taller matrix, in small and in large models."""

WIDEST_FACTOR = 2560
"""Largest side of a matrix whose factors are considered in a large model."""


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


def considered(model: nn.Module, group: Group, methods: Sequence[str], large: bool = False) -> list[str]:
    """The methods that make sense for a group, "keep" first: no factors for lookups, none that needs inputs where there
    are none, no group longer than a row, nothing that is not smaller, and routers as they are."""
    shapes = [shape_of(model, member) for member in owners(model, group)]
    lookups = [is_lookup(model, member) for member in group.members]
    has_lookup, only_lookups = any(lookups), all(lookups)
    whole = group_bytes(model, group, "keep")
    kept = ["keep"]
    for text in methods:
        if text == "keep" or group.kind == "router":
            continue
        method = method_for(group, text)
        wide = large and max(max(shape) for shape in shapes) > WIDEST_FACTOR
        if method.has_factors and (has_lookup or wide):
            continue
        if method.needs_inputs and only_lookups:
            continue
        if any(map(_too_wide, method.specs(shapes))):
            continue
        if group_bytes(model, group, text) < whole:
            kept.append(str(method))
    return list(dict.fromkeys(kept))


def _too_wide(spec: Weight) -> bool:
    """Whether a block of scales is wider than the rows: the format would then be another one under its name."""
    parts = spec.parts().values()
    if parts:
        return any(map(_too_wide, parts))
    return isinstance(spec, Quantized) and (spec.format.block.columns or 0) > spec.shape[1]


def judge(
    model: nn.Module, methods: Sequence[str], parameters: int, calibrated: Stage, stage: Stage, progress: Progress
) -> dict[str, list[Judged]]:
    """Candidates of every group in the model's order. Each finished group is on disk; the unfinished are resumed."""
    every = groups(model)
    done = sum(stage.has(f"group-{index:04}") for index in range(len(every)))
    progress.stage("candidates", len(every), done)
    lookups = lookups_of(calibrated)
    found: dict[str, list[Judged]] = {}
    for index, group in enumerate(every):
        name = f"group-{index:04}"
        if not stage.has(name):
            large = parameters > LARGE
            with torch.no_grad():
                rows = _judge_group(
                    model, group, considered(model, group, methods, large), calibrated, lookups, ROWS[large]
                )
            stage.write(name, [vars(row) for row in rows])
            progress.advance()
        found[group.name] = [Judged(**row) for row in stage.read(name)]
    stage.finish()
    return found


def _judge_group(
    model: nn.Module, group: Group, texts: list[str], calibrated: Stage, lookups: Lookups, limit: int
) -> list[Judged]:
    statistics = statistics_of(calibrated, group)
    sums: dict[str, list[float]] = {text: [0.0, 0.0, 0.0] for text in texts}
    methods = {text: Method.parse(text) for text in texts[1:]}
    every: dict[str, _Uses] = {}
    previous: Statistics | None = None

    def add(text: str, costs: tuple[float, float, float]) -> None:
        sums[text] = [total + cost for total, cost in zip(sums[text], costs, strict=True)]

    for member in owners(model, group):
        weight = matrix(model, member)
        uses = every[member] = _Uses.of(model, group, member, statistics, lookups)
        uses.share_root(previous)
        some = torch.arange(0, weight.shape[0], -(-weight.shape[0] // limit))
        part = weight[some].float()
        whole = part if all(each.rows_apart or each.together for each in methods.values()) else weight.float()
        for text, method in methods.items():
            if uses.known and not method.together:
                chosen, rows = (part, some) if method.rows_apart else (whole, None)
                spec, tensors = method(chosen, uses.statistics)
                add(text, uses.cost(chosen, spec.dense(*tensors), rows, weight.shape[0]))
        previous = uses.statistics
    known = all(uses.known for uses in every.values())
    joint = {text: method for text, method in methods.items() if known and method.together}
    members = [(matrix(model, member).float(), every[member].statistics) for member in (every if joint else ())]
    for text, method in joint.items():
        for uses, (weight, _), (spec, tensors) in zip(every.values(), members, method.each(members), strict=True):
            add(text, uses.cost(weight, spec.dense(*tensors), None, weight.shape[0]))
    judged: list[Judged] = []
    for text in texts if known else texts[:1]:
        loss, error, power = sums[text]
        judged.append(Judged(text, group_bytes(model, group, text), loss, error / power if power else 0.0))
    return [row for row in judged if row.finite]


@dataclass
class _Uses:
    """How one matrix is used: it multiplies (statistics), it is looked up (lookups), or, tied, both."""

    statistics: Statistics | None
    lookups: Lookups | None

    @staticmethod
    def of(model: nn.Module, group: Group, member: str, statistics: dict[str, Statistics], lookups: Lookups) -> _Uses:
        names = [other for other in group.members if other in same(model, member)]
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

    def cost(self, part: Tensor, stored: Tensor, rows: Tensor | None, total: int) -> tuple[float, float, float]:
        """Predicted loss (nats per token), squared error of the outputs and their power, of a matrix with `total` rows
        of which `part` becomes `stored`.

        rows: which rows these are, evenly spaced ones that stand for all; None for all themselves.
        """
        share = part.shape[0] / total
        chosen = torch.arange(total) if rows is None else rows
        delta = part - stored
        loss = error = power = 0.0
        if self.statistics is not None:
            gram, count = self.statistics.gram, self.statistics.count
            squares = row_error(delta, gram, count)
            energy = self.statistics.row_energy
            error, power = float(squares.sum()), float(row_error(part, gram, count).sum())
            loss += error if energy is None else 0.5 * float((squares * energy[chosen]).sum())
        if self.lookups is not None:
            known = chosen < self.lookups.frequency.shape[0]
            frequency = self.lookups.frequency[chosen[known]]
            squares = frequency @ delta[known].square()
            loss += 0.5 * float((squares * self.lookups.energy).sum())
            error += float(squares.sum())
            power += float((frequency @ part[known].square()).sum())
        return loss / share, error / share, power / share
