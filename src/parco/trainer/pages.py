"""report.html of a training folder once more, from what lies there: of a run that is done or goes on, or of several."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, TypedDict

from parco.fitting.stages import write_whole
from parco.report import curves
from parco.trainer import folder
from parco.trainer.gaps import Gap, gaps
from parco.trainer.result import RunResult, SoFar, so_far


class Going(TypedDict):
    """A run that is not done: how many of its steps its last checkpoint has."""

    recipe: str
    seed: int
    step: int
    steps: int


class Remade(TypedDict):
    """What the page is of. `runs` are done; of a folder of one run that goes on that one is `so_far`."""

    runs: list[RunResult]
    gaps: list[Gap]
    so_far: SoFar | None
    going: list[Going]


def is_training(out: Path) -> bool:
    """Whether `out` holds a run, or runs side by side."""
    return folder.has_run(out) or bool(_below(out))


def remake(out: Path) -> Remade:
    """Writes `out`/report.html and returns what it shows. ValueError where nothing is there to be shown yet, or a file
    is damaged.
    """
    several = _below(out)
    found = Remade(runs=[], gaps=[], so_far=None, going=[])
    for place in several or [out]:
        if (place / "result.json").exists():
            found["runs"].append(json.loads((place / "result.json").read_text()))
            continue
        found["so_far"] = None if several else so_far(out)
        found["going"].append(_going(place))
    shown = found["runs"] or ([found["so_far"]["run"]] if found["so_far"] else [])
    if several and shown:
        shown = found["runs"] = _paired(shown, _order(out, several))
    if not shown:
        told = "; ".join(f"{one['recipe']}, seed {one['seed']}: step {one['step']}" for one in found["going"])
        raise ValueError(f"{out} has no run that is done yet, or has a checkpoint ({told}): wait for it")
    found["gaps"] = gaps(shown)
    write_whole(out / "report.html", functools.partial(curves.write, shown, found["gaps"]))
    return found


def _below(out: Path) -> list[Path]:
    """The runs in folders of `out`, in the order in which they began."""
    places = [] if folder.has_run(out) or not out.is_dir() else [each for each in out.iterdir() if folder.has_run(each)]
    return sorted(places, key=lambda place: (folder.began(place), place.name))


def _order(out: Path, places: list[Path]) -> list[str]:
    """The recipes side by side, the first is what the others are beside."""
    if (out / "result.json").exists():
        return [gap["recipe"] for gap in json.loads((out / "result.json").read_text())["gaps"]]
    return list(dict.fromkeys(folder.read(place)["recipe"] for place in places))


def _paired(runs: list[RunResult], order: list[str]) -> list[RunResult]:
    """Those with a seed that the first recipe's runs have, recipe by recipe; all where that has none yet."""
    order = order + [run["recipe"] for run in runs if run["recipe"] not in order]
    runs = sorted(runs, key=lambda run: (order.index(run["recipe"]), run["settings"]["seed"]))
    seeds = {run["settings"]["seed"] for run in runs if run["recipe"] == runs[0]["recipe"]}
    return [run for run in runs if run["settings"]["seed"] in seeds]


def _going(place: Path) -> Going:
    settings: dict[str, Any] = folder.read(place)
    at = max((int(each.name.rpartition("-")[2]) for each in place.glob("checkpoint-*")), default=0)
    steps = settings["steps"] or settings["known"]["tokens"] // (settings["batch"] * settings["seq"])
    return Going(recipe=settings["recipe"], seed=settings["seed"], step=at, steps=steps)
