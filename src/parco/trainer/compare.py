"""The same training by several recipes: for each seed the same weights at the start and the same order of the data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from parco.fitting.stages import Progress, write_json
from parco.report import curves
from parco.trainer.gaps import Gap, gaps
from parco.trainer.run import RunResult, Settings, run
from parco.training import Recipe


class Comparison(TypedDict):
    """result.json of a comparison: every run, recipe by recipe, and what they say."""

    gaps: list[Gap]
    runs: list[RunResult]


def compare(
    settings: Settings,
    recipes: Sequence[str],
    out: Path,
    progress: Progress,
    *,
    seeds: int = 1,
    resume: bool = False,
    shard: bool = False,
) -> Comparison:
    """Runs each recipe with the seeds settings.seed, settings.seed + 1, …, in folders below `out`, all recipes of one
    seed before the next, and writes `out`/result.json and `out`/report.html after every seed.

    With `resume` runs that are done are kept and the one that was interrupted goes on. Raises what `run` raises, and
    ValueError for fewer than two recipes or one that is given twice.
    """
    for recipe in recipes:
        Recipe.parse(recipe)
    if len(recipes) < 2 or len(set(recipes)) < len(recipes):
        raise ValueError(
            f"--compare {','.join(recipes)}: give two or more recipes, the first is what others are beside"
        )
    if seeds < 1:
        raise ValueError(f"--seeds {seeds} makes no sense: give at least 1")
    runs: list[RunResult] = []
    found = Comparison(gaps=[], runs=runs)
    for seed in range(settings.seed, settings.seed + seeds):
        for recipe in recipes:
            own = dataclasses.replace(settings, recipe=recipe, seed=seed)
            name = re.sub(r"[^\w.-]+", "-", recipe)
            folder = out / f"{name}-seed{seed}"
            runs.append(run(own, folder, progress, resume=resume and folder.exists(), shard=shard))
        found = Comparison(gaps=gaps(runs), runs=runs)
        write_json(out / "result.json", found)
        curves.write(runs, found["gaps"], out / "report.html")
    return found
