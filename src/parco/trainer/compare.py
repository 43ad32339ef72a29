"""The same training by several recipes: for each seed the same weights at the start and the same order of the data."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from parco.fitting.stages import Progress, digest, write_json, write_whole
from parco.report import curves
from parco.trainer import folder
from parco.trainer.gaps import Gap, gaps
from parco.trainer.result import RunResult
from parco.trainer.run import Settings, run
from parco.training import Recipe


class Failure(TypedDict):
    """A run whose numbers stopped being finite, and what it said."""

    recipe: str
    seed: int
    said: str


class Comparison(TypedDict):
    """result.json of a comparison: every run, recipe by recipe, what they say, and the runs that failed."""

    gaps: list[Gap]
    runs: list[RunResult]
    failed: list[Failure]


def compare(
    settings: Settings,
    recipes: Sequence[str],
    out: Path,
    progress: Progress,
    *,
    seeds: int = 1,
    resume: bool = False,
    shard: bool = False,
    tensorboard: bool = False,
) -> Comparison:
    """Runs each recipe with the seeds settings.seed, settings.seed + 1, …, in folders below `out`, all recipes of one
    seed before the next, and writes `out`/result.json and `out`/report.html after every seed.

    With `resume` runs that are done are kept and the one that was interrupted goes on. A recipe other than the first
    whose numbers stop being finite is among the `failed`, and the others go on. Raises what `run` raises, ValueError
    for fewer than two recipes or one that is given twice, and where runs that are kept had another text.
    """
    for recipe in recipes:
        Recipe.parse(recipe)
    if len(recipes) < 2 or len(set(recipes)) < len(recipes):
        raise ValueError(
            f"--compare {','.join(recipes)}: give two or more recipes, the first is what others are beside"
        )
    if seeds < 1:
        raise ValueError(f"--seeds {seeds} makes no sense: give at least 1")
    _check(out, resume)
    found = Comparison(gaps=[], runs=[], failed=[])
    for seed in range(settings.seed, settings.seed + seeds):
        for recipe in recipes:
            own = dataclasses.replace(settings, recipe=recipe, seed=seed)
            place = out / f"{_name(recipe)}-seed{seed}"
            try:
                goes_on = resume and folder.has_run(place)
                done = run(own, place, progress, resume=goes_on, shard=shard, tensorboard=tensorboard)
            except FloatingPointError as error:
                if recipe == recipes[0]:  # beside it are the others
                    raise
                found["failed"].append(Failure(recipe=recipe, seed=seed, said=str(error)))
                progress.note(f"{recipe}, seed {seed}: {error}")
                continue
            found["runs"].append(done)
            if done["text"] != found["runs"][0]["text"]:
                raise ValueError(f"{place} was trained on another text than the runs before: name a new folder")
        found["gaps"] = gaps(found["runs"])
        write_json(out / "result.json", found)
        write_whole(out / "report.html", functools.partial(curves.write, found["runs"], found["gaps"]))
    return found


def _check(out: Path, resume: bool) -> None:
    """Refuses a folder that holds something else than runs, or with `resume` none."""
    inside = list(out.iterdir()) if out.is_dir() else []
    has_runs = any(folder.has_run(each) for each in inside)
    if folder.has_run(out):
        raise FileExistsError(f"--out {out} holds a run of one recipe, --compare makes a folder for each: name another")
    if out.is_file() or (inside and not has_runs):
        raise FileExistsError(f"--out {out} holds something that is no training run: name a new folder")
    if resume and not has_runs:
        raise FileNotFoundError(f"--resume: --out {out} holds no training run; without --resume one begins there")


def _name(recipe: str) -> str:
    """A recipe's text as the name of a folder."""
    name = re.sub(r"[^\w.-]+", "-", recipe)
    return name if len(name) < 100 else f"{name[:80]}-{digest(recipe)}"
