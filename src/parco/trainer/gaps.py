"""What training runs by several recipes say of each recipe, beside the first."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from parco.trainer.result import RunResult


class Gap(TypedDict):
    """One recipe beside the first. `gap` is the mean over seeds of the rise in held-out loss relative to the first
    recipe's with the same seed, `error` its standard error (None for one seed); the other fields are means.
    """

    recipe: str
    seeds: int
    loss: float
    gap: float
    error: float | None
    tokens_per_second: float
    times: float
    mfu: float
    peak_memory: float
    skipped: int


def gaps(runs: Sequence[RunResult]) -> list[Gap]:
    """What the runs say of each recipe; the first run's recipe is what the others are beside."""
    first = {run["settings"]["seed"]: run for run in runs if run["recipe"] == runs[0]["recipe"]}
    found: list[Gap] = []
    for recipe in dict.fromkeys(run["recipe"] for run in runs):
        mine = [run for run in runs if run["recipe"] == recipe and run["settings"]["seed"] in first]
        pairs = [(run, first[run["settings"]["seed"]]) for run in mine]
        rises = [run["loss"] / beside["loss"] - 1 for run, beside in pairs]
        found.append(
            Gap(
                recipe=recipe,
                seeds=len(mine),
                loss=statistics.mean(run["loss"] for run in mine),
                gap=statistics.mean(rises),
                error=statistics.stdev(rises) / math.sqrt(len(rises)) if len(rises) > 1 else None,
                tokens_per_second=statistics.mean(run["tokens_per_second"] for run in mine),
                times=statistics.median(
                    run["tokens_per_second"] / beside["tokens_per_second"] for run, beside in pairs
                ),
                mfu=statistics.mean(run["mfu"] for run in mine),
                peak_memory=statistics.mean(run["peak_memory"] for run in mine),
                skipped=sum(run["skipped"] for run in mine),
            )
        )
    return found
