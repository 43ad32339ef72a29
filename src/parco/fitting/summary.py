"""Put a finished fit into the schema of result.json (result.py)."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from parco import machine
from parco.fitting import alternatives, evaluate, measure, size
from parco.fitting.evaluate import Quality
from parco.fitting.methods import Method
from parco.fitting.pipeline import SUBSET, Chosen, Fit, correction
from parco.fitting.plan import Fixed, Option, Plan
from parco.fitting.result import (
    SCHEMA,
    Alternative,
    Column,
    FrontierPoint,
    GroupRow,
    Passed,
    Remainder,
    Result,
    Sample,
    StageTime,
    Target,
)
from parco.fitting.size import shape_of, stored_bytes
from parco.fitting.solve import Goal
from parco.fitting.table import owners_shapes, products, reason
from parco.kernels.table import NATIVE, explain
from parco.nn import Embedding, StoredWeight
from parco.nn.blocks import Group, groups

VERSIONS = ("parco", "torch", "transformers", "tokenizers", "safetensors", "scipy", "numpy")


@dataclasses.dataclass(frozen=True)
class Final:
    """Measurements of the finished model beside the original, made once and kept on disk."""

    original: Quality
    fitted: Quality
    speeds: Mapping[str, tuple[float, float]]
    memory: tuple[int | None, int | None]
    sample: Sample


def final(fit: Fit, chosen: Chosen, saved: Path) -> Final:
    """Quality on the whole held-out text, speeds interleaved, peak memory of fresh processes, one completion."""
    original, fitted = fit.rise(chosen)
    key = {**fit.base, "methods": chosen.plan.methods, "steps": fit.steps}
    stage = fit.stages.open("final", **key)
    if not stage.whole:
        model = fit.original.model
        fit.progress.stage("final", 3)
        rounds = 7 if fit.parameters <= size.LARGE else 3
        speeds = measure.interleaved({"original": model, "fitted": chosen.model}, fit.prefill, rounds)
        fit.progress.advance()
        prompt = evaluate.sample_prompt(fit.original.tokenizer, fit.windows.held)
        texts = [
            evaluate.complete(each, fit.original.tokenizer, prompt, fit.windows.length)
            for each in (model, chosen.model)
        ]
        fit.progress.advance()
        memory = [evaluate.peak_memory(folder) for folder in (fit.original.path, saved)]
        fit.progress.advance()
        stage.write("final", {"speeds": speeds, "prompt": prompt, "texts": texts, "memory": memory})
        stage.finish()
    found = stage.read("final")
    sample = Sample(prompt=found["prompt"], original=found["texts"][0], fitted=found["texts"][1])
    speeds = {name: (value[0], value[1]) for name, value in found["speeds"].items()}
    return Final(original, fitted, speeds, (found["memory"][0], found["memory"][1]), sample)


def result(
    fit: Fit,
    outcome: tuple[Chosen, list[Plan], list[tuple[str, Plan]], Mapping[str, list[Option]], Fixed, Goal],
    measured: Final,
    named: str,
    command: str,
    folder: Path,
) -> Result:
    """The whole result. `named` is what the person called the model, `folder` where the fitted one is saved."""
    chosen, plans, frontier, options, fixed, goal = outcome
    warnings = fit.warnings
    subset = min(SUBSET, fit.windows.held.shape[0])
    rows = alternatives.compare(fit, chosen, subset)
    original, fitted = _columns(fit, chosen, measured)
    if None in measured.memory:
        warnings.append("the peak memory of a fresh process could not be measured")
    warnings += better(rows, subset)
    model: Any = fit.original.model
    return Result(
        schema=SCHEMA,
        parco=fit.settings.version,
        model=named,
        architecture=type(model).__name__,
        fingerprint=fit.original.fingerprint,
        parameters=fit.parameters,
        checkpoint_bytes=fit.checkpoint,
        folder=str(folder),
        command=command,
        seed=fit.settings.seed,
        threads=torch.get_num_threads(),
        target=target(goal, original, fitted, warnings),
        plan=chosen.plan.to_json(),
        data=fit.windows.describe() | {"compared_windows": subset},
        prefill_tokens=fit.prefill,
        original=original,
        fitted=fitted,
        frontier=points(fit, chosen.plan, plans, frontier),
        groups=[_group_row(fit, group, chosen, options[group.name]) for group in groups(model)],
        alternatives=rows,
        remainder=_remainder(fixed, goal),
        heal=chosen.healed,
        sample=measured.sample,
        machine=dataclasses.asdict(machine.detect()),
        versions=versions(),
        stages=[StageTime(stage=s.name, seconds=s.seconds, resumed=s.resumed) for s in fit.stages.opened if s.whole],
        warnings=list(dict.fromkeys(warnings)),
    )


def better(rows: Sequence[Alternative], windows: int) -> list[str]:
    """Says that a uniform alternative is better than the chosen plan where the least loss is by more than its standard
    error over these `windows`.
    """
    best, chosen = min(rows, key=lambda row: row["loss"]), next(row for row in rows if row["chosen"])
    gain, error = chosen["loss"] - best["loss"], best["error"]
    if error is None or gain <= error:
        return []
    by = f"{gain:.2g} ± {error:.1g} nats per token over {windows} windows"
    return [f"the uniform alternative {best['name']} has a lower loss than the chosen plan, by {by}"]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _columns(fit: Fit, chosen: Chosen, measured: Final) -> tuple[Column, Column]:
    columns: list[Column] = []
    for name, judged, stored, memory in (
        ("original", measured.original, stored_bytes(fit.original.model), measured.memory[0]),
        ("fitted", measured.fitted, stored_bytes(chosen.model), measured.memory[1]),
    ):
        decode, prefill = measured.speeds[name]
        columns.append(
            Column(
                name=name,
                bytes=stored,
                fraction=stored / fit.checkpoint,
                loss=judged.loss,
                perplexity=judged.perplexity,
                kl=judged.kl,
                top1=judged.top1,
                decode=1.0 / decode,
                prefill=fit.prefill / prefill,
                memory=memory,
            )
        )
    return columns[0], columns[1]


def target(goal: Goal, original: Column, fitted: Column, warnings: list[str]) -> Target:
    """The goal beside what was measured, with a warning where it is missed."""
    if goal.kind == "size":
        reached, met = fitted["fraction"], fitted["fraction"] <= goal.value
    elif goal.kind == "speed":
        reached = fitted["decode"] / original["decode"]
        met = reached >= goal.value
    else:
        reached = fitted["loss"] - original["loss"]
        met = reached <= goal.value
    if not met:
        warnings.append(f"--{goal.kind} {goal.value:g} was not met: {reached:.4g} was measured in the end")
    if fitted["decode"] < 0.98 * original["decode"]:
        warnings.append("the fitted model decodes slower than the original did in the final measurement")
    if fitted["prefill"] < 0.9 * original["prefill"]:
        warnings.append("the fitted model's prefill is below 0.9 of the original's in the final measurement")
    kind: Any = goal.kind
    return Target(kind=kind, value=goal.value, reached=reached, met=met)


def points(fit: Fit, chosen: Plan, plans: list[Plan], frontier: list[tuple[str, Plan]]) -> list[FrontierPoint]:
    """The sweep and the measured plans by bytes, each once; predictions are corrected by the measured plans."""
    factor = correction(plans)
    named: dict[str, tuple[str, Plan]] = {plan.name: (label, plan) for label, plan in frontier}
    for index, plan in enumerate(plans):
        label = named[plan.name][0] if plan.name in named else f"tried {index + 1}"
        named[plan.name] = (label, plan)
    named[chosen.name] = (named[chosen.name][0] if chosen.name in named else "chosen", chosen)
    found: list[FrontierPoint] = []
    for label, plan in sorted(named.values(), key=lambda item: (item[1].bytes, item[1].name)):
        measured = plan.measured
        found.append(
            FrontierPoint(
                name=label,
                plan=plan.name,
                summary=plan.summary,
                bytes=plan.bytes,
                fraction=plan.bytes / fit.checkpoint,
                predicted_loss=plan.loss * factor,
                measured_loss=None if measured is None else measured.loss,
                healed_loss=None if measured is None else measured.healed,
                decode_seconds=plan.decode,
                prefill_seconds=plan.prefill,
                measured_decode_seconds=None if measured is None else measured.decode,
                measured_prefill_seconds=None if measured is None else measured.prefill,
                chosen=plan.name == chosen.name,
            )
        )
    return found


def _group_row(fit: Fit, group: Group, chosen: Chosen, options: list[Option]) -> GroupRow:
    model = fit.original.model
    method = chosen.plan.methods[group.name]
    taken = next(option for option in options if option.method == method)
    keep = next(option for option in options if option.method == "keep")
    passed = [
        Passed(
            method=option.method,
            bytes=option.bytes,
            predicted_loss=option.loss,
            decode_seconds=option.decode or None,
            prefill_seconds=option.prefill or None,
            reason=reason(option, taken),
        )
        for option in options
        if option.method != method
    ]
    return GroupRow(
        group=group.name,
        kind=group.kind,
        members=list(group.members),
        shapes=owners_shapes(model, group),
        method=method,
        kernel=kernel_name(fit, group, method),
        bytes=taken.bytes,
        original_bytes=keep.bytes,
        predicted_loss=taken.loss,
        measured_error=chosen.applied.errors.get(group.name),
        decode_seconds=taken.decode or None,
        prefill_seconds=taken.prefill or None,
        original_decode_seconds=keep.decode or None,
        original_prefill_seconds=keep.prefill or None,
        passed=passed,
    )


def kernel_name(fit: Fit, group: Group, method: str) -> str:
    """The kernel that the group's first product (or lookup) runs on at batch 1, or what runs instead."""
    if method == "keep":
        return NATIVE
    model = fit.original.model
    work = products(model, group)
    if work.shapes:
        runs = next(iter(size.specs_of(model, group, method).values()))
    else:
        spec = Method.parse(method).spec(shape_of(model, group.members[0]))
        runs = Embedding(StoredWeight.empty(spec, device="meta"))
    found = explain(runs, rows=1, dtype=fit.dtype)
    return " + ".join(dict.fromkeys(each.kernel for each in found)) or NATIVE


def _remainder(fixed: Fixed, goal: Goal) -> Remainder:
    decode = fixed.decode / goal.original_decode
    prefill = fixed.prefill / goal.original_prefill
    return Remainder(
        decode_seconds=fixed.decode,
        prefill_seconds=fixed.prefill,
        decode_share=decode,
        prefill_share=prefill,
        explanation=(
            f"Of the original's {goal.original_decode * 1e3:.2f} ms per token {decode:.0%}, and of its "
            f"{goal.original_prefill * 1e3:.1f} ms per prompt {prefill:.0%}, is not spent in products with "
            "weights: attention, norms, the cache, and what Transformers and Python add to every layer. No choice of "
            "products changes it."
        ),
    )
