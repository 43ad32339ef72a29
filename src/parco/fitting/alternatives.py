"""Uniform alternatives: one method for every matrix, at most as large as the chosen plan, equally healed, on the same
windows.

They are what the plan has to beat to be worth its trouble.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from parco.fitting import size
from parco.fitting.evaluate import Quality, standard_error
from parco.fitting.pipeline import Chosen, Fit
from parco.fitting.result import Alternative
from parco.nn.blocks import groups

FAMILIES = (
    ("int5:64",),
    ("int4:32", "int4:64", "int4:128"),
    ("int3:32", "int3:64"),
    ("factor>>int8:row",),
    ("factor>>int4:64",),
    ("factor",),
)
"""Of each family the first that fits runs; a factor takes the largest ratio that fits."""

RATIOS = tuple(step / 100 for step in range(96, 3, -4))


def uniform(model: nn.Module, family: Sequence[str], budget: int) -> dict[str, str] | None:
    """The family's first method that takes at most `budget` bytes for all groups but routers; None without one."""
    for text in family:
        ratios = RATIOS if text.startswith("factor") else (None,)
        for ratio in ratios:
            method = text if ratio is None else f"factor({ratio:g}){text.removeprefix('factor')}"
            methods = everywhere(model, method)
            if size.planned_bytes(model, methods) <= budget:
                return methods
    return None


def everywhere(model: nn.Module, method: str) -> dict[str, str]:
    return {group.name: method for group in groups(model) if group.kind != "router"}


def compare(fit: Fit, chosen: Chosen, subset: int) -> list[Alternative]:
    """The chosen plan and every uniform alternative that fits into its bytes, on `subset` held-out windows."""
    steps = 0 if chosen.healed is None else chosen.healed["steps"]
    plan = fit.quality(chosen.model, chosen.plan.methods, subset)
    rows = [_row(fit, "chosen plan", chosen.plan.bytes, plan, plan, steps, True)]
    if fit.parameters > size.LARGE:  # each would cost as much as the plan itself
        fit.warnings.append(
            f"uniform alternatives were not run: the model has more than {size.LARGE // 10**6} M parameters"
        )
        return rows
    for family in FAMILIES:
        methods = uniform(fit.original.model, family, chosen.plan.bytes)
        if methods is None:
            fit.warnings.append(f"no uniform {family[-1]} fits into the chosen plan's {chosen.plan.bytes} bytes")
            continue
        model, _ = fit.apply(methods)
        fit.heal(model, methods)
        name = next(iter(methods.values()))
        stored = size.planned_bytes(fit.original.model, methods)
        rows.append(_row(fit, name, stored, fit.quality(model, methods, subset), plan, steps, False))
    return rows


def _row(fit: Fit, name: str, stored: int, judged: Quality, plan: Quality, steps: int, chosen: bool) -> Alternative:
    return Alternative(
        name=name,
        bytes=stored,
        fraction=stored / fit.checkpoint,
        loss=judged.loss,
        error=standard_error(judged.losses, plan.losses),
        kl=judged.kl,
        top1=judged.top1,
        healed_steps=steps,
        chosen=chosen,
    )
