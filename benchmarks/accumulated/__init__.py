"""Trainings that take hours each: what is finished is kept in the claim's results file, so that several sessions, also
on several machines, add up to one table, and a run that is there is not run again.
"""

import json
import math
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from interleaved import RESULTS

from parco import hub
from parco.cli import terminal
from parco.fitting.stages import write_json
from parco.trainer import RunResult, Settings, run

WINDOW, BATCH, RATE = 512, 16, 2e-3
POINTS = 60
"""Points of a kept curve."""
DECIDE = ("recipe", "steps", "batch", "accumulate", "seq", "lr", "warmup", "weight_decay", "weights", "states", "seed")
"""Settings that decide a run's numbers, besides its text and model, which are the same for all."""
DROPPED = ("train", "layers", "watched", "mfu", "peak_memory", "tokens_per_second", "runs_on", "settings")
"""What is not kept of a result, or not as it is: speeds are those of machines that had other work to do as well."""


def texts(folder: Path) -> tuple[Path, Path]:
    """The standard library's sources without those that are held out, as a folder, and the held-out text."""
    train = folder / "text"
    embedded = hub.embedded_path()
    if not train.exists():
        held = set(json.loads((embedded / "training.json").read_text())["held_out"])
        library = Path(sysconfig.get_paths()["stdlib"])
        partial = folder / "text.partial"
        for line in (embedded / "sources.tsv").read_text().splitlines():
            name = line.rpartition("\t")[2]
            source = library / name
            if not line.startswith("#") and name not in held and source.is_file():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_bytes(source.read_bytes())
        partial.rename(train)
    return train, embedded / "heldout.txt"


def settings_of(recipe: str, seed: int, tokens: int, out: Path) -> Settings:
    """The run of a recipe: the embedded model's architecture from new weights, on the text that it was made of."""
    data, held = texts(out)
    steps = -(-tokens // (WINDOW * BATCH))
    return Settings(
        model=None, data=(str(data),), held=str(held), steps=steps, recipe=recipe, batch=BATCH, seq=WINDOW,
        lr=RATE, seed=seed, eval_every=max(1, steps // 20), save_every=max(1, steps // 50),
    )  # fmt: skip


def kept(claim: str) -> list[dict[str, Any]]:
    """The runs in the claim's results file."""
    file = RESULTS / f"{claim}.json"
    return json.loads(file.read_text())["runs"] if file.exists() else []


def identity(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells one run from another."""
    return tuple(settings.get(name) for name in DECIDE)


def thinned(result: RunResult) -> dict[str, Any]:
    """What is kept of a run."""
    whole: dict[str, Any] = dict(result)
    every = math.ceil(len(result["train"]) / POINTS)
    curves = {"train": _rounded(result["train"][::every]), "held_out": _rounded(result["held_out"])}
    settings = {name: value for name, value in result["settings"].items() if name in DECIDE}
    return {name: value for name, value in whole.items() if name not in DROPPED} | curves | {"settings": settings}


def _rounded(curve: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[int(step), round(loss, 5)] for step, loss in curve]


def add(claim: str, results: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Puts finished runs into the results file, each in place of one with the same identity, and returns all that are
    there then. ValueError for one on another text than those that are there.
    """
    runs = {identity(run["settings"]): run for run in kept(claim)}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    for result in results:
        other = next((run for run in runs.values() if run["text"] != result["text"]), None)
        if other is not None:
            raise ValueError(
                f"{result['recipe']}, seed {result['settings']['seed']}, was trained on the text {result['text']}, "
                f"those in {claim}.json on {other['text']}: the standard library of the same Python is needed"
            )
        key = identity(result["settings"])
        if key not in runs or runs[key]["loss"] != result["loss"]:
            runs[key] = thinned(result) | {"merged_at": commit.stdout.strip()}
    found = [runs[key] for key in sorted(runs, key=lambda key: tuple(map(str, key)))]
    if found:
        write_json(RESULTS / f"{claim}.json", {"claim": claim, "runs": found})
    return found


def finished(out: Path, steps: int, recipes: Sequence[str]) -> Iterator[RunResult]:
    """The results of the runs in `out` that are done, of so many steps and one of the recipes."""
    for file in sorted(out.glob(f"*-{steps}-seed*/result.json")):
        result: RunResult = json.loads(file.read_text())
        if result["recipe"] in recipes:
            yield result


def train(
    claim: str, names: Mapping[str, str], tokens: int, wanted: Sequence[str], seeds: Sequence[int], out: Path
) -> list[dict[str, Any]]:
    """Takes in what is done in `out`, runs the `wanted` of `names` (texts of recipes by name), every recipe of one seed
    before the next, that are not kept yet, and returns all kept runs of so many tokens.
    """
    out.mkdir(parents=True, exist_ok=True)
    steps = -(-tokens // (WINDOW * BATCH))
    runs = add(claim, list(finished(out, steps, list(names.values()))))
    for seed in seeds:
        for name in wanted:
            settings = settings_of(names[name], seed, tokens, out)
            if identity(settings.to_json()) in {identity(each["settings"]) for each in runs}:
                continue
            folder = out / f"{name.replace(':', '-').replace(' ', '-')}-{steps}-seed{seed}"
            with terminal.progress() as progress:
                runs = add(claim, [run(settings, folder, progress, resume=folder.exists())])
    return [each for each in runs if each["settings"]["steps"] == steps]
