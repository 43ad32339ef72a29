"""The solver's plan is the best of all, within every limit, and an impossible goal names what is possible."""

from __future__ import annotations

import ctypes
import itertools
import json
import random
import sys
from typing import Any

import pytest

from parco.fitting.plan import Fixed, Measured, Option, Plan, assemble
from parco.fitting.solve import Goal, Limits, best, frontier, solve

solving = sys.modules["parco.fitting.solve"]
FIXED = Fixed(100, 2e-4, 3e-3)


def table(groups: int = 5, seed: int = 0) -> dict[str, list[Option]]:
    draw = random.Random(seed)
    made: dict[str, list[Option]] = {}
    for group in range(groups):
        size, time = draw.randint(1000, 9000), draw.uniform(1e-5, 9e-5)
        made[f"g{group}"] = [Option("keep", size, 0.0, time, time * 10)] + [
            Option(
                f"int{bits}:64",
                size * bits // 16,
                0.5**bits * draw.uniform(0.5, 2),
                time * draw.uniform(0.3, 1.2),
                time * 11,
            )
            for bits in (8, 5, 4, 3)
        ]
    return made


def every_plan(options: dict[str, list[Option]]) -> list[Plan]:
    return [assemble(list(zip(options, choice, strict=True)), FIXED) for choice in itertools.product(*options.values())]


@pytest.mark.parametrize("seed", range(4))
def test_the_plan_is_the_best_of_all_that_fit(seed: int) -> None:
    options = table(seed=seed)
    everything = every_plan(options)
    kept = everything[0]
    limits = Limits(bytes=kept.bytes * 0.35, decode=kept.decode)
    found = solve(options, FIXED, limits, {"loss": 1.0})
    allowed = [plan for plan in everything if plan.bytes <= limits.bytes and plan.decode <= kept.decode]  # type: ignore[operator]
    assert found is not None and found.bytes <= kept.bytes * 0.35 and found.decode <= kept.decode
    assert found.loss == pytest.approx(min(plan.loss for plan in allowed), rel=2e-3)


def test_a_loss_budget_minimises_bytes() -> None:
    options = table(seed=7)
    everything = every_plan(options)
    goal = Goal("loss", 0.05, 1, everything[0].decode * 2, everything[0].prefill * 2)
    found = best(options, FIXED, goal, 1)[0]
    assert found.loss <= 0.05 * (1 + 1e-6)
    smallest = min(plan.bytes for plan in everything if plan.loss <= 0.05)
    assert found.bytes <= smallest * 1.02


def test_plans_differ_and_the_first_is_the_best() -> None:
    options = table(12)
    kept = sum(rows[0].bytes for rows in options.values()) + FIXED.bytes
    plans = best(options, FIXED, Goal("size", 0.35, kept, 1.0, 1.0))
    assert len({plan.name for plan in plans}) == 3
    assert plans[0].loss <= min(plan.loss for plan in plans[1:]) * (1 + 1e-3)
    assert plans == best(options, FIXED, Goal("size", 0.35, kept, 1.0, 1.0))


def test_a_size_comes_before_speed_when_every_small_plan_is_slower() -> None:
    options = {"g": [Option("keep", 1000, 0.0, 1e-4, 1e-3), Option("int4:64", 300, 0.1, 1.3e-4, 1e-3)]}
    plans = best(options, Fixed(0, 0.0, 0.0), Goal("size", 0.5, 1000, 1e-4, 1e-3))
    assert plans[0].methods == {"g": "int4:64"}


def test_ranks_are_allocated_by_bytes_or_by_measured_seconds() -> None:
    """Two groups whose directions matter alike, and whose kernels do not: one takes four times as long for a rank."""
    energies = [0.7**step for step in range(12)]
    seconds = {"quick": 1e-6, "slow": 4e-6}

    def option(rank: int, cost: float) -> Option:
        return Option(f"factor(rank={16 * rank})", 1000 * rank, sum(energies[rank:]), cost * rank, cost * rank)

    options = {
        name: [Option("keep", 24_000, 0.0, 24 * cost, 24 * cost), *(option(rank, cost) for rank in range(1, 12))]
        for name, cost in seconds.items()
    }
    original = sum(24 * cost for cost in seconds.values())
    by_bytes = best(options, Fixed(0, 0.0, 0.0), Goal("size", 0.25, 48_000, original, original), 1)[0]
    by_time = best(options, Fixed(0, 0.0, 0.0), Goal("speed", 4.0, 48_000, original, original), 1)[0]
    assert by_bytes.methods == {"quick": "factor(rank=96)", "slow": "factor(rank=96)"}
    # Step by step, whatever loses least for what it costs: the greedy allocation on marginal loss per microsecond.
    ranks, room = dict.fromkeys(seconds, 1), original / 4 - sum(seconds.values())
    while True:
        fits = [name for name in seconds if seconds[name] <= room + 1e-12 and ranks[name] < 11]
        if not fits:
            break
        chosen = max(fits, key=lambda name: energies[ranks[name]] / seconds[name])
        ranks[chosen], room = ranks[chosen] + 1, room - seconds[chosen]
    assert by_time.methods == {name: f"factor(rank={16 * rank})" for name, rank in ranks.items()}
    assert ranks["quick"] > ranks["slow"]


def test_a_goal_out_of_reach_names_the_best_reachable() -> None:
    options = {"g": [Option("keep", 1000, 0.0, 1e-4, 1e-3), Option("int4:64", 300, 0.1, 5e-5, 1e-3)]}
    fixed = Fixed(0, 5e-5, 0.0)
    with pytest.raises(ValueError, match=r"--size 0.2 cannot be reached: the smallest plan takes 0.3 of"):
        best(options, fixed, Goal("size", 0.2, 1000, 1.5e-4, 1e-3))
    with pytest.raises(
        ValueError, match=r"--speed 3 cannot be reached: the fastest plan is predicted to decode 1\.(49|5) times"
    ):
        best(options, fixed, Goal("speed", 3.0, 1000, 1.5e-4, 1e-3))


def test_the_frontier_falls_with_size() -> None:
    options = table(10)
    kept = sum(rows[0].bytes for rows in options.values()) + FIXED.bytes
    goal = Goal("size", 0.5, kept, 1.0, 1.0)
    points = [plan for _, plan in frontier(options, FIXED, goal, (0.05, 0.22, 0.3, 0.5, 0.8))]
    assert len(points) >= 4
    assert all(a.bytes < b.bytes and a.loss > b.loss for a, b in itertools.pairwise(points))


def test_a_plan_survives_json_and_its_name_depends_on_the_choices_alone() -> None:
    plan = Plan((("a", "int4:64"), ("b", "keep")), 10, 0.1, 1e-3, 2e-3, Measured(0.2, 0.1, 1e-3, None))
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert Plan(plan.choices, 11, 0.0, 0.0, 0.0).name == plan.name
    assert Plan((("a", "int8:row"), ("b", "keep")), 10, 0.1, 1e-3, 2e-3).name != plan.name
    with pytest.raises(ValueError, match="choices"):
        Plan.from_json({"bytes": 1, "loss": 0, "decode": 0, "prefill": 0})


def test_what_the_solver_prints_is_not_seen(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Some versions of HiGHS leave a debugging line on standard output, from C."""
    real = solving.milp

    def noisy(*arguments: Any, **options: Any) -> Any:
        ctypes.CDLL(None).puts(b"noise of C")
        return real(*arguments, **options)

    monkeypatch.setattr(solving, "milp", noisy)
    assert solve(table(), FIXED, Limits(), {"loss": 1.0}) is not None
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == ""
