"""What a run is told of its formats while it trains: readings, who is at fault, and falling back."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import torch.distributed as dist

from parco.fitting.stages import Progress, Silent, void, write_whole
from parco.trainer import disk
from parco.training import Readings, Watch, diagnose, fall_back_, prepare_, recipes_of

MOST_NAMED = 3
"""Findings that are named when they are new; how many more there are is said."""


class Watched(TypedDict):
    """One operand of one product over all layers at one step; ratios are in dB, None where nothing is lost."""

    step: int
    product: str
    operand: str
    median_snr_db: float | None
    worst_snr_db: float | None
    worst_layer: str
    underflow: float
    saturated: float


class Watching:
    """Watches a prepared `model` every so many steps, tells `progress` what is at fault, and with `fallback` moves that
    to a higher precision. `summary` and `said` go into result.json; `file`, where there is one, gets every reading as a
    line of JSON.
    """

    def __init__(
        self,
        model: Any,
        every: int,
        *,
        fallback: bool = False,
        progress: Progress | None = None,
        file: Path | None = None,
    ) -> None:
        self.model, self.every, self.fallback = model, every, fallback
        self.progress = progress or Silent()
        self.file = file
        self.told: Callable[[Readings], None] = void
        """Whom readings are told besides."""
        self.watch = self._begin()
        self.summary: list[Watched] = []
        self.said: list[str] = []
        self._named: set[tuple[str, str]] = set()

    def _begin(self) -> Watch:
        group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
        return Watch(self.model, self.every, group=group)

    def step(self) -> Readings | None:
        """Ends the backward passes of a step: its readings where it was watched. All ranks do the same."""
        readings = self.watch.step()
        if readings is None:
            return None
        self.summary += summarized(readings)
        self._write(readings)
        self.told(readings)
        found = diagnose(self.watch.history)
        new = [each for each in found if (each.layer, each.product) not in self._named]
        self._named |= {(each.layer, each.product) for each in new}
        told = [f"step {readings.step}: {each}" for each in new[:MOST_NAMED]]
        told += [f"step {readings.step}: and {len(new) - MOST_NAMED} products more"] * (len(new) > MOST_NAMED)
        if self.fallback and found:
            told += [f"step {readings.step}: {moved}" for moved in fall_back_(self.model, found)]
        for text in told:
            self.progress.note(text)
        self.said += told
        return readings

    def _write(self, readings: Readings) -> None:
        if self.file is not None:
            with disk.explained(self.file), self.file.open("a") as opened:
                scalars = {
                    name: value if math.isfinite(value) else None for name, value in readings.scalars("").items()
                }
                opened.write(json.dumps({"step": readings.step, **scalars}) + "\n")

    def save(self, path: Path) -> None:
        """Writes what `load` needs."""
        state = {
            "watch": self.watch.state_dict(),
            "recipes": recipes_of(self.model),
            "summary": self.summary,
            "said": self.said,
            "named": sorted(self._named),
        }
        path.write_text(json.dumps(state))

    def load(self, path: Path) -> None:
        """Goes on where `save` was: also with the recipes that layers had fallen back to, whose delayed scales begin
        anew until the model's state is loaded.
        """
        state = json.loads(path.read_text())
        if state["recipes"] != recipes_of(self.model):
            self.watch.close()
            prepare_(self.model, state["recipes"])
            self.watch = self._begin()
        self.watch.load_state_dict(state["watch"])
        self.summary, self.said = state["summary"], state["said"]
        self._named = {(layer, product) for layer, product in state["named"]}
        if self.file is not None and self.file.exists():
            lines = [line for line in self.file.read_text().splitlines() if _is_whole(line)]
            kept = [line for line in lines if json.loads(line)["step"] <= self.watch.steps]
            text = "".join(f"{line}\n" for line in kept)
            write_whole(self.file, lambda partial: void(partial.write_text(text)))


def _is_whole(line: str) -> bool:
    return line.startswith("{") and line.endswith("}")


def summarized(readings: Readings) -> list[Watched]:
    """Each operand over all layers."""
    places = dict.fromkeys((one.product, one.operand) for one in readings.operands)
    found: list[Watched] = []
    for product, operand in places:
        mine = [one for one in readings.operands if (one.product, one.operand) == (product, operand)]
        worst = min(mine, key=lambda one: one.snr_db)
        found.append(
            Watched(
                step=readings.step,
                product=product,
                operand=operand,
                median_snr_db=_finite(statistics.median(one.snr_db for one in mine)),
                worst_snr_db=_finite(worst.snr_db),
                worst_layer=worst.layer,
                underflow=statistics.mean(one.underflow for one in mine),
                saturated=statistics.mean(one.saturated for one in mine),
            )
        )
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
