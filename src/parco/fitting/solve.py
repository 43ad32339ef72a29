"""Choose one option per group: a multiple-choice knapsack, solved exactly by HiGHS through SciPy.

Costs add over groups (bytes exactly, seconds as measured per kernel, loss to second order), so the choice is a linear
program over binary variables with one equality per group. Its optimum is exact up to the gap given here; what is not
exact is additivity, which is why the pipeline applies several plans and measures each end to end.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp  # pyright: ignore[reportUnknownVariableType]
from scipy.sparse import csr_matrix  # pyright: ignore[reportMissingTypeStubs]

from parco.fitting.plan import Fixed, Option, Plan, assemble

GAP = 1e-4
"""Relative gap at which HiGHS may stop. Far below the error of the loss prediction."""

QUANTITIES = ("bytes", "loss", "decode", "prefill")


@dataclass(frozen=True)
class Limits:
    """Upper limits of a plan's totals; None where there is none. Loss in nats per token, times in seconds."""

    bytes: float | None = None
    loss: float | None = None
    decode: float | None = None
    prefill: float | None = None


Table = Mapping[str, Sequence[Option]]


def solve(
    table: Table,
    fixed: Fixed,
    limits: Limits,
    weights: Mapping[str, float],
    exclude: Sequence[Plan] = (),
    distance: int = 1,
) -> Plan | None:
    """The plan of least Σ weight · quantity within `limits` that differs from each excluded plan in at least `distance`
    groups.

    table: the options of every group. weights: of "bytes", "loss", "decode", "prefill"; each quantity is scaled by its
    total at the largest options first, so weights compare relative changes. Returns None when no plan is within the
    limits. Deterministic: the same arguments give the same plan.
    """
    groups = list(table)
    options = [(index, option) for index, group in enumerate(groups) for option in table[group]]
    columns = len(options)
    assert columns, "a table without options"
    values = {name: np.array([getattr(option, name) for _, option in options], dtype=float) for name in QUANTITIES}
    scales = {name: max(_largest(values[name], options, len(groups)), 1e-300) for name in QUANTITIES}
    objective = sum((weights.get(name, 0.0) * values[name] / scales[name] for name in QUANTITIES), np.zeros(columns))

    member = csr_matrix(
        (np.ones(columns), ([index for index, _ in options], range(columns))), shape=(len(groups), columns)
    )
    constraints = [LinearConstraint(member, 1, 1)]
    for name in QUANTITIES:
        limit = getattr(limits, name)
        if limit is not None and limit < float("inf"):
            # HiGHS lets a row exceed its limit by 1e-6: far below a byte in these units, and 1e-9 of noise for the
            # rest.
            unit = 1e4 if name == "bytes" else scales[name]
            room = limit - getattr(fixed, name, 0.0)
            upper = np.floor(room) / unit if name == "bytes" else room / unit + 1e-9
            constraints.append(LinearConstraint(values[name][None] / unit, -np.inf, upper))
    for plan in exclude:
        chosen = plan.methods
        same = np.array([float(chosen.get(groups[index]) == option.method) for index, option in options])
        constraints.append(LinearConstraint(same[None], -np.inf, len(groups) - min(distance, len(groups))))
    with _muted():
        answer = milp(  # pyright: ignore[reportUnknownVariableType]
            objective * 1e4,  # HiGHS also stops at an absolute gap of 1e-6, which must be small beside the objective
            integrality=np.ones(columns),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": GAP},
        )
    if answer.x is None:  # pyright: ignore[reportUnknownMemberType]
        return None
    picked = np.flatnonzero(np.asarray(answer.x) > 0.5)  # pyright: ignore[reportUnknownMemberType,reportUnknownArgumentType]
    assert len(picked) == len(groups), "the solver's answer is not one option per group"
    return assemble([(groups[options[i][0]], options[i][1]) for i in picked], fixed)


@contextmanager
def _muted() -> Generator[None]:
    """Nothing written to the process's standard output: some versions of HiGHS leave a debugging line there."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what C has buffered goes nowhere too
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _largest(values: np.ndarray, options: Sequence[tuple[int, Option]], groups: int) -> float:
    """Sum over the groups of the largest value of each: a scale that makes quantities of different units comparable."""
    top = np.zeros(groups)
    for value, (index, _) in zip(values, options, strict=True):
        top[index] = max(top[index], value)
    return float(top.sum())


@dataclass(frozen=True)
class Goal:
    """What the person asked for, in absolute terms. `decode` and `prefill` are the original's limits in seconds."""

    kind: str  # "size", "speed" or "loss"
    value: float
    checkpoint_bytes: int
    original_decode: float
    original_prefill: float

    def limits(self, loss: float | None = None, slack: float = 1.0) -> Limits:
        """Limits of the goal: never slower than the original in decode, prefill at least 0.9 of its speed, both times
        `slack`.

        `loss`: the predicted loss to allow in place of the goal's own value (the pipeline calibrates it by
        measurements).
        """
        limits = Limits(decode=self.original_decode * slack, prefill=self.original_prefill / 0.9 * slack)
        if self.kind == "size":
            return replace(limits, bytes=self.value * self.checkpoint_bytes)
        if self.kind == "speed":
            return replace(limits, decode=self.original_decode / self.value)
        return replace(limits, loss=self.value if loss is None else loss)

    @property
    def weights(self) -> dict[str, float]:
        """Size and speed minimise loss (bytes break ties); a loss budget minimises bytes (seconds break ties)."""
        if self.kind == "loss":
            return {"bytes": 1.0, "decode": 0.02, "prefill": 0.005, "loss": 1e-3}
        return {"loss": 1.0, "bytes": 1e-5}


SLACKS = (1.0, 1.05, 1.1, 1.2, 1.4, 2.0, float("inf"))
"""How much slower than the original a plan may be, tried in turn: what was asked for comes before what was not."""


def best(table: Table, fixed: Fixed, goal: Goal, count: int = 3, loss: float | None = None) -> list[Plan]:
    """The best `count` plans for the goal, the first the optimum, each differing from those before in a tenth of the
    groups.

    Fewer when there are no more. When every plan that meets the goal is slower than the original, the least slowdown of
    SLACKS that has a plan is allowed. Raises ValueError naming the best reachable value when no plan meets the goal at
    all.
    """
    distance = max(1, len(table) // 10)
    plans: list[Plan] = []
    for slack in SLACKS:
        limits = goal.limits(loss, slack)
        while len(plans) < count:
            plan = solve(table, fixed, limits, goal.weights, plans, distance)
            if plan is None:
                break
            plans.append(plan)
        if plans:
            return plans
    raise ValueError(unreachable(table, fixed, goal))


def unreachable(table: Table, fixed: Fixed, goal: Goal) -> str:
    """The message for a goal that no plan meets, naming the best that is reachable."""
    wanted = f"--{goal.kind} {goal.value:g} cannot be reached"
    if goal.kind == "size":
        plan = solve(table, fixed, Limits(), {"bytes": 1.0})
        assert plan is not None
        reached = -(-plan.bytes * 1000 // goal.checkpoint_bytes) / 1000
        return f"{wanted}: the smallest plan takes {reached:g} of the bf16 checkpoint's bytes"
    if goal.kind == "speed":
        plan = solve(table, fixed, Limits(), {"decode": 1.0})
        assert plan is not None
        fastest = int(goal.original_decode / plan.decode * 100) / 100
        return f"{wanted}: the fastest plan is predicted to decode {fastest:g} times as fast as the original"
    plan = solve(table, fixed, Limits(), {"loss": 1.0})
    assert plan is not None
    return f"{wanted}: the best plan is predicted to cost {plan.loss:.4g} nats per token"


def frontier(table: Table, fixed: Fixed, goal: Goal, sizes: Sequence[float]) -> list[tuple[str, Plan]]:
    """The plan of least loss at each size (fractions of the checkpoint) that is reachable, without repeats."""
    found: list[tuple[str, Plan]] = []
    seen: set[str] = set()
    for size in sizes:
        sized = replace(goal, kind="size", value=size)
        attempts = (solve(table, fixed, sized.limits(slack=slack), sized.weights) for slack in SLACKS)
        plan = next((plan for plan in attempts if plan is not None), None)
        if plan is not None and plan.name not in seen:
            seen.add(plan.name)
            found.append((f"size {size:g}", plan))
    return found
