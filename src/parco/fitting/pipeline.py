"""The main job: calibrate -> candidates -> measure -> solve -> apply -> heal -> evaluate, each stage on disk.

`Fit` holds what all stages share and has one method per stage; `run` is the order of them. Loading and saving models is
handed in, because this package does not import the hub. A plan is applied to a fresh copy of the original each time:
the original's file is memory-mapped, so a copy costs what it changes.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from parco import machine
from parco.fitting import apply, calibrate, candidates, evaluate, measure, size, solve, table, texts
from parco.fitting import heal as healing
from parco.fitting.plan import Fixed, Measured, Option, Plan, assemble
from parco.fitting.result import HealRecord
from parco.fitting.stages import Progress, Stage, Stages, tell
from parco.nn.saved import describe

SUBSET = 48
"""Held-out windows on which the chosen plan is compared with uniform alternatives."""


class Loaded(Protocol):
    """What the hub loads: a model in eval mode in the checkpoint's dtype, its tokenizer, its folder, its fingerprint
    and what is to be known of it.
    """

    @property
    def model(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def path(self) -> Path: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def notes(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Settings:
    """What the person asked for. `kind` is "size", "speed" or "loss"; `heal` None means as many steps as suit the
    model.
    """

    kind: str
    value: float
    methods: tuple[str, ...] | None = None
    heal: int | None = None
    seed: int = 0
    version: str = ""


@dataclass
class Chosen:
    """The plan that was taken, with the model that it made."""

    plan: Plan
    model: Any
    applied: apply.Applied
    healed: HealRecord | None


class Fit:
    """One job. `load` gives a fresh copy of the original, `read` the token windows for its tokenizer."""

    def __init__(
        self,
        settings: Settings,
        load: Callable[[], Loaded],
        read: Callable[[Any, int], texts.Windows],
        generated: int,
        stages: Stages,
        progress: Progress,
        timings: measure.Timings | None = None,
    ) -> None:
        self.settings = settings
        self.load = load
        self.stages = stages
        self.progress = progress
        self.timings = timings or measure.Timings(settings.version)
        self.methods = candidates.parse_methods(settings.methods)
        self.warnings: list[str] = []
        progress.stage("load", 1)
        self.original = load()
        progress.advance()
        tell(progress, self.original.notes)
        model: nn.Module = self.original.model
        if describe(model).weights:
            raise ValueError(
                f"{str(self.original.path)!r} is stored in few bits already: fit the model that it came from"
            )
        self.dtype: torch.dtype = self.original.model.dtype
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.footprint = sum(parameter.nbytes for parameter in model.parameters())
        self.checkpoint = size.checkpoint_bytes(model)
        self.extent = calibrate.Extent.for_model(self.parameters)
        self.steps = healing.automatic_steps(self.parameters) if settings.heal is None else settings.heal
        self.windows = self._windows(read, generated)
        self.prefill = self.windows.length
        self.base = {
            "parco": settings.version,
            "model": self.original.fingerprint,
            "data": self.windows.digest,
            "generated": self.windows.generated,
            "window": self.windows.length,
            "seed": settings.seed,
            "threads": torch.get_num_threads(),
            "isa": machine.isa(),
        }

    def _windows(self, read: Callable[[Any, int], texts.Windows], generated: int) -> texts.Windows:
        """Token windows, with `generated` ones that the model writes itself added to the calibration."""
        model, tokenizer = self.original.model, self.original.tokenizer
        windows = read(tokenizer, texts.window_length(model))
        if windows.held.shape[0] > self.extent.held:
            windows = replace(windows, held=windows.held[: self.extent.held])
            self.warnings.append(f"a model of this size is judged on the first {self.extent.held} held-out windows")
        if generated == 0:
            return windows
        stage = self.stages.open(
            "generate", model=self.original.fingerprint, seed=self.settings.seed, count=generated, length=windows.length
        )
        if not stage.whole:
            self.progress.stage("generate", 1)
            own = texts.generate(model, generated, windows.length, self.settings.seed)
            stage.write_tensors("tokens", {"tokens": own})
            stage.finish()
            self.progress.advance()
        own = stage.read_tensors("tokens")["tokens"]
        # Alternate, so that whichever part of the windows is looked at holds some of both.
        half = min(own.shape[0], windows.calibration.shape[0])
        mixed = torch.stack([own[:half], windows.calibration[:half]], 1).flatten(0, 1)
        return replace(
            windows,
            calibration=torch.cat([mixed, windows.calibration[half:]]),
            source=f"{windows.source} and {generated} windows that the model wrote itself",
            generated=generated,
        )

    def calibrate(self) -> Stage:
        stage = self.stages.open("calibrate", **self.base, extent=vars(self.extent))
        if not stage.whole:
            calibrate.calibrate(
                self.original.model, self.windows, self.extent, self.settings.seed, stage, self.progress
            )
        return stage

    def judge(self) -> dict[str, list[candidates.Judged]]:
        stage = self.stages.open("candidates", **self.base, methods=self.methods)
        calibrated = self.calibrate()
        return candidates.judge(self.original.model, self.methods, self.parameters, calibrated, stage, self.progress)

    def speeds(self, name: str, models: Callable[[], dict[str, nn.Module]]) -> dict[str, tuple[float, float]]:
        """Measured (decode, prefill) seconds of whole models by name, taken from the cache where this comparison is
        known.
        """
        keys = {
            (kind, what): f"end to end {self.original.fingerprint[:16]} | {name} | {kind} | {what} | {self.prefill}"
            for kind in (("original",) if name == "original" else ("original", "fitted"))
            for what in ("decode", "prefill")
        }
        if not all(key in self.timings for key in keys.values()):
            self.progress.stage("speed", 1)
            rounds = 5 if self.parameters <= size.LARGE else 3
            found = measure.interleaved(models(), self.prefill, rounds)
            self.timings.add({key: found[kind][what == "prefill"] for (kind, what), key in keys.items()})
            self.progress.advance()
        kinds = dict.fromkeys(kind for kind, _ in keys)
        return {kind: (self.timings[keys[kind, "decode"]], self.timings[keys[kind, "prefill"]]) for kind in kinds}

    def table(self, judged: Mapping[str, list[candidates.Judged]]) -> tuple[dict[str, list[Option]], Fixed, solve.Goal]:
        model = self.original.model
        table.measure(model, judged, self.prefill, self.footprint, self.dtype, self.timings, self.progress)
        decode, prefill = self.speeds("original", lambda: {"original": model})["original"]
        options, fixed = table.build(
            model,
            judged,
            (decode, prefill),
            size.stored_bytes(model),
            self.prefill,
            self.footprint,
            self.dtype,
            self.timings,
        )
        every = [option for rows in options.values() for option in rows if option.method == "keep"]
        goal = solve.Goal(
            self.settings.kind,
            self.settings.value,
            self.checkpoint,
            fixed.decode + sum(option.decode for option in every),
            fixed.prefill + sum(option.prefill for option in every),
        )
        return options, fixed, goal

    def fresh(self) -> Any:
        gc.collect()
        return self.load().model

    def forget(self) -> None:
        """Map a large original's file anew, so that what was read of it no longer counts as this process's memory."""
        if self.parameters > size.LARGE:
            self.original = self.load()
            gc.collect()

    def apply(self, methods: Mapping[str, str]) -> tuple[Any, apply.Applied]:
        """A fresh model with these methods applied, from disk where it was done before."""
        named = {group: method for group, method in sorted(methods.items()) if method != "keep"}
        stage = self.stages.open("apply", **self.base, extent=vars(self.extent), methods=named)
        calibrated = self.calibrate()
        if not stage.whole:
            self.forget()
            model = self.fresh()
            apply.apply_(model, named, self.windows, self.extent, calibrated, stage, self.progress)
            del model
        # A second fresh model, of whose file only what is kept will be read: the first has mapped all of it into
        # memory.
        model = self.fresh()
        apply.restore(model, stage)
        return model, apply.read_applied(stage)

    def heal(self, model: Any, methods: Mapping[str, str]) -> HealRecord | None:
        """Heal an applied model in place; None when no steps are wanted or nothing was changed."""
        named = {group: method for group, method in sorted(methods.items()) if method != "keep"}
        if self.steps == 0 or not named:
            return None
        key = {**self.base, "extent": vars(self.extent), "methods": named, "steps": self.steps}
        stage = self.stages.open("heal", **key)
        if stage.whole:
            return healing.restore(model, stage)
        taught = self.stages.open("teacher", **self.base, steps=self.steps)
        original = self.original.model
        teacher = healing.teach(original, self.windows, self.steps, self.settings.seed, taught, self.progress)
        check = self.windows.check[: self.extent.check]
        return healing.heal(
            model, original, teacher, check, self.calibrate(), self.steps, self.settings.seed, stage, self.progress
        )

    def tried(self, plan: Plan) -> Plan:
        """The plan with its KL and its end-to-end seconds measured."""
        model, applied = self.apply(plan.methods)
        found = self.speeds(plan.name, lambda: {"original": self.original.model, "fitted": model})
        # Other runs of this machine may have been slower or faster throughout: the original of the same run is the
        # yardstick.
        original = self.timings_of_original()
        decode, prefill = (found["fitted"][i] / found["original"][i] * original[i] for i in (0, 1))
        return plan.with_measured(Measured(applied.kl, None, decode, prefill))

    def timings_of_original(self) -> tuple[float, float]:
        return self.speeds("original", lambda: {"original": self.original.model})["original"]

    def search(self, options: Mapping[str, list[Option]], fixed: Fixed, goal: solve.Goal) -> list[Plan]:
        """Up to three plans for the goal, applied and measured; for a loss, budgets that close in on it."""
        if goal.kind == "loss":
            return self._search_loss(options, fixed, goal)
        count = 3 if self.parameters <= size.LARGE else 2
        plans = [self.tried(plan) for plan in solve.best(options, fixed, goal, count)]
        if goal.kind == "speed" and not any(meets(plan, goal) for plan in plans):
            slower = max((plan.measured.decode or 0) / plan.decode for plan in plans if plan.measured)
            tighter = replace(goal, value=goal.value * slower * 1.03)
            plans += [self.tried(plan) for plan in solve.best(options, fixed, tighter, 1)]
        return plans

    def _search_loss(self, options: Mapping[str, list[Option]], fixed: Fixed, goal: solve.Goal) -> list[Plan]:
        wanted = goal.value * (1.5 if self.steps else 1.0)
        budget = wanted
        plans: dict[str, Plan] = {}
        for _ in range(3):
            plan = self.tried(solve.best(options, fixed, goal, 1, budget)[0])
            plans.setdefault(plan.name, plan)
            measured = plan.measured
            assert measured is not None
            if plan.loss <= 0 or 0.85 * wanted <= measured.loss <= wanted:
                break
            budget = max(plan.loss * wanted / max(measured.loss, 1e-9) * 0.97, 1e-6)
        return list(plans.values())

    def choose(self, plans: list[Plan], goal: solve.Goal, allowed: float | None = None) -> Plan:
        """The best of the measured plans: those that meet the goal first, then by what the goal minimises."""
        wanted = (goal.value * (1.5 if self.steps else 1.0)) if allowed is None else allowed

        def rank(plan: Plan) -> tuple[bool, float]:
            assert plan.measured is not None
            if goal.kind == "loss":
                fits = plan.measured.loss <= wanted
                return (not (fits and meets(plan, goal)), plan.bytes if fits else plan.measured.loss * 1e12)
            return (not meets(plan, goal), plan.measured.loss)

        return min(plans, key=rank)

    def finish(self, plan: Plan) -> Chosen:
        """Heal the plan and put what came of it into its measurements."""
        model, applied = self.apply(plan.methods)
        healed = self.heal(model, plan.methods)
        assert plan.measured is not None
        measured = plan.measured if healed is None else replace(plan.measured, healed=healed["kl_after"])
        return Chosen(plan.with_measured(measured), model, applied, healed)

    def rise(self, chosen: Chosen) -> tuple[evaluate.Quality, evaluate.Quality]:
        """Quality of the original and of the chosen model on the whole held-out text."""
        fitted = self.quality(chosen.model, chosen.plan.methods)
        return evaluate.Quality(fitted.original_loss, 0.0, 1.0, fitted.original_loss), fitted

    def quality(self, model: Any, methods: Mapping[str, str], subset: int | None = None) -> evaluate.Quality:
        """Quality of a model that these methods (and healing) have made, beside the original, on held-out windows."""
        named = {group: method for group, method in sorted(methods.items()) if method != "keep"}
        held = self.windows.held[:subset]
        key = {
            **self.base,
            "extent": vars(self.extent),
            "methods": named,
            "steps": self.steps,
            "windows": held.shape[0],
        }
        stage = self.stages.open("evaluate", **key)
        if not stage.whole:
            stage.write("quality", vars(evaluate.quality(model, held, self.progress, self.original.model)))
            stage.finish()
        return evaluate.Quality(**stage.read("quality"))

    def run(self) -> tuple[Chosen, list[Plan], list[tuple[str, Plan]], Mapping[str, list[Option]], Fixed, solve.Goal]:
        """The chosen model, the measured plans, the frontier, the table, what is fixed and the goal."""
        judged = self.judge()
        options, fixed, goal = self.table(judged)
        offered = table.offered(options)
        self.progress.stage("solve", 1)
        frontier = solve.frontier(offered, fixed, goal, FRONTIER)
        self.progress.advance()
        plans = self.search(offered, fixed, goal)
        if goal.kind != "speed" and all(plan.decode > goal.original_decode for plan in plans):
            self.warnings.append(
                "every plan within the budget is predicted to decode slower than the original on this machine"
            )
        chosen = self.finish(self.choose(plans, goal))
        if goal.kind == "loss":
            chosen = self._honour(chosen, plans, offered, fixed, goal)
        return chosen, plans, frontier, options, fixed, goal

    def _honour(
        self, chosen: Chosen, plans: list[Plan], options: Mapping[str, list[Option]], fixed: Fixed, goal: solve.Goal
    ) -> Chosen:
        """Step back until the measured rise of the held-out loss is within the goal. Keeping everything always is."""
        for _ in range(3):
            before, after = self.rise(chosen)
            rise = after.loss - before.loss
            if rise <= goal.value or not chosen.plan.loss:
                return chosen
            self.progress.note(f"the loss rose by {rise:.4f}, over the allowed {goal.value:g}: a larger plan is tried")
            budget = chosen.plan.loss * min(0.8, 0.9 * goal.value / rise)
            plan = self.tried(solve.best(options, fixed, goal, 1, budget)[0])
            plans.append(plan)
            chosen = self.finish(plan)
        before, after = self.rise(chosen)
        if after.loss - before.loss <= goal.value:
            return chosen
        kept = assemble([(name, next(o for o in rows if o.method == "keep")) for name, rows in options.items()], fixed)
        plans.append(self.tried(kept))
        return self.finish(plans[-1])


FRONTIER = (0.15, 0.18, 0.2, 0.22, 0.25, 0.28, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8)


def meets(plan: Plan, goal: solve.Goal) -> bool:
    """Whether a measured plan is as fast as the goal asks; 2% of noise is forgiven beside the original."""
    measured = plan.measured
    if measured is None or measured.decode is None or measured.prefill is None:
        return False
    limit = goal.original_decode / goal.value if goal.kind == "speed" else goal.original_decode * 1.02
    return measured.decode <= limit and measured.prefill <= goal.original_prefill / 0.9 * 1.02


def correction(plans: list[Plan]) -> float:
    """Median of measured over predicted loss of the plans that were applied: what the frontier's predictions are
    multiplied by.
    """
    ratios = [plan.measured.loss / plan.loss for plan in plans if plan.measured is not None and plan.loss > 0]
    return statistics.median(ratios) if ratios else 1.0
