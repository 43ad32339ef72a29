"""What a run found, as result.json holds it, and what one that goes on has found so far."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
import transformers
from transformers.trainer_utils import get_last_checkpoint

import parco
from parco import machine
from parco.trainer import disk, folder
from parco.trainer.meter import Meter
from parco.trainer.trainer import Trainer
from parco.trainer.watching import Watched
from parco.trainer.windows import Split

PROBED = 60.0
"""Seconds of a run after which two more seconds for measuring the machine's peaks again are worth it."""


class RunResult(TypedDict):
    """What one run found, as result.json holds it. Losses are in nats per token: `train` and `held_out`, the latter of
    the first 64 windows, are [step, loss] pairs, `loss` is that of all held-out windows at the end. Memory is in bytes
    above what the process held before its first run; `mfu` is the share of the machine's measured peak. `watched`
    and `said` are what watching found.
    """

    recipe: str
    settings: dict[str, Any]
    parco: str
    versions: dict[str, str]
    cpu: str
    threads: int
    runs_on: str
    layers: str
    parameters: int
    text: str
    windows: int
    tokens: int
    held_out_windows: int
    train: list[list[float]]
    held_out: list[list[float]]
    loss: float
    tokens_per_second: float
    mfu: float
    peak_memory: int
    skipped: int
    watched: list[Watched]
    said: list[str]


class SoFar(TypedDict):
    """A run that goes on, at its last checkpoint, after `step` of its steps. `loss` is the last that held-out windows
    gave, `run` a result without what only the end tells: its memory and its share of the peak are 0.
    """

    step: int
    steps: int
    checkpoint: str
    run: RunResult


def begun(settings: dict[str, Any], trainer: Trainer, texts: Split, layers: str) -> dict[str, Any]:
    """What of a result is known before the first step; settings.json keeps it."""
    model: Any = trainer.model
    return {
        "recipe": settings["recipe"],
        "parco": parco.__version__,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "cpu": machine.detect().cpu,
        "threads": torch.get_num_threads(),
        "runs_on": trainer.describe(),
        "layers": layers,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "text": texts.digest,
        "windows": len(texts.train),
        "tokens": trainer.args.max_steps * settings["batch"] * settings["seq"],
        "held_out_windows": len(texts.held),
    }


def finished(
    known: dict[str, Any], settings: dict[str, Any], trainer: Trainer, loss: float, peak: int, meter: Meter
) -> RunResult:
    """The result of a run whose last log is that of all held-out windows, which gave `loss`."""
    if meter.spent > PROBED:
        meter.peaks = machine.best(meter.peaks, machine.peaks(refresh=True))  # a probe too is slowed by what else runs
    logs: list[dict[str, Any]] = trainer.state.log_history
    found: dict[str, Any] = logged(logs) | {
        "settings": settings,
        "loss": loss,
        "peak_memory": peak,
        "skipped": int(trainer.skipped),
        "watched": trainer.watching.summary if trainer.watching else [],
        "said": trainer.watching.said if trainer.watching else [],
    }
    found["held_out"].pop()
    found["tokens_per_second"], found["mfu"] = meter.rate(_seconds(logs))
    return cast(RunResult, known | found)


def so_far(out: Path) -> SoFar | None:
    """The run in `out` at its last checkpoint; None before the first. ValueError where a file of it is damaged, or an
    earlier version of parco began it, which kept too little of what it knew.
    """
    checkpoint = get_last_checkpoint(str(out))
    if checkpoint is None:
        return None
    begun_with = folder.read(out)
    if "known" not in begun_with:
        raise ValueError(f"{out} holds a run that an earlier version of parco began: wait until it is done")
    with disk.read(Path(checkpoint) / "trainer_state.json") as file:
        state: dict[str, Any] = json.loads(file.read_text())
    watched: dict[str, Any] = {"summary": [], "said": []}
    if (Path(checkpoint) / "watch.json").exists():
        with disk.read(Path(checkpoint) / "watch.json") as file:
            watched = json.loads(file.read_text())
    logs: list[dict[str, Any]] = state["log_history"]
    found: dict[str, Any] = logged(logs) | {
        "settings": {name: begun_with[name] for name in begun_with if name not in ("made_of", "runs_on", "known")}
        | {"steps": state["max_steps"]},
        "mfu": 0.0,
        "peak_memory": 0,
        "skipped": max([0, *(int(entry.get("skipped", 0)) for entry in logs)]),
        "watched": watched["summary"],
        "said": watched["said"],
    }
    found["loss"] = found["held_out"][-1][1] if found["held_out"] else math.nan
    found["tokens_per_second"] = begun_with["batch"] * begun_with["seq"] / _seconds(logs)
    run = cast(RunResult, begun_with["known"] | found)
    return SoFar(step=state["global_step"], steps=state["max_steps"], checkpoint=checkpoint, run=run)


def logged(logs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The curves of a log."""
    return {
        "train": [[entry["step"], entry["loss"]] for entry in logs if "step_seconds" in entry],
        "held_out": [[entry["step"], entry["eval_loss"]] for entry in logs if "eval_loss" in entry],
    }


def _seconds(logs: Sequence[dict[str, Any]]) -> float:
    """Those of a step; the first that is logged has waited for much that others do not."""
    timed = [entry["step_seconds"] for entry in logs if "step_seconds" in entry]
    return statistics.median(timed[1:] or timed)
