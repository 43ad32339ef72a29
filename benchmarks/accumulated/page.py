"""docs/concepts/training-loss.md, made of the results files of both claims about what recipes cost in loss."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accumulated import kept

PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "training-loss.md"
LOSSES, PARTS = "recipes_train_to_bf16s_loss", "what_each_part_of_a_recipe_brings"
MISSING = "not measured yet"
LIMITS: dict[str, float | None] = {
    "fp16": 0.3, "fp8-delayed": 0.5, "fp8-current": 0.5, "fp8-current:row": 0.5, "fp8-block": 0.5, "mxfp8": 0.5,
    "mxfp6": 3, "mxfp4": None, "nvfp4": 2, "fp4-dge": 3, "int8": 1, "bitnet": None,
}  # fmt: skip
"""Percent of bf16's held-out loss that a recipe may cost; None where it is only reported."""
SEEDS = dict.fromkeys(("bf16", "fp8-current", "mxfp8", "nvfp4"), 3)
"""Seeds that are wanted, where it is more than one."""
VARIANTS: dict[str, tuple[str, str | None]] = {
    "bf16": ("bf16", None),
    "nvfp4": ("nvfp4", None),
    "nvfp4 without stochastic rounding": (
        "output=nvfp4 @ nvfp4:16x16; grad_input=nvfp4 @ nvfp4:16x16; grad_weight=nvfp4+hadamard16 @ nvfp4+hadamard16; "
        "ends=0.16",
        "nvfp4",
    ),
    "nvfp4 without Hadamard transform": (
        "output=nvfp4 @ nvfp4:16x16; grad_input=nvfp4+stochastic @ nvfp4:16x16; grad_weight=nvfp4+stochastic @ nvfp4; "
        "ends=0.16",
        "nvfp4",
    ),
    "fp4-dge": ("fp4-dge", None),
    "fp4-dge without estimator": (
        "output=fp4_e2m1:row+clamp0.99 @ fp4_e2m1:row; grad_input=fp8_e5m2:tensor @ fp4_e2m1:row+reused; "
        "grad_weight=fp8_e5m2:tensor @ fp4_e2m1:row+clamp0.99+reused",
        "fp4-dge",
    ),
}
"""Recipes with and without one of their parts, and the recipe that each is a part less of."""

_HEAD = """# What recipes cost in loss

<!-- Written by benchmarks/recipes_train_to_bf16s_loss.py and benchmarks/what_each_part_of_a_recipe_brings.py. -->

The model that comes with parco ({parameters}), from new weights, on the sources of Python's standard library: every
[recipe](../guides/training.md) on the same windows in the same order, for each seed. The loss is that of {windows}
held-out windows of 512 tokens at the end, in nats per token; what stands beside it is its rise over bf16's with the
same seed, relative, the mean over seeds with its standard error. Trainings take more than an hour of a core each and
add up over sessions: `{missing}` says that nobody has finished that one.
"""


def by_recipe(runs: Sequence[Mapping[str, Any]], recipe: str) -> dict[int, Mapping[str, Any]]:
    """The runs of a recipe by their seeds."""
    return {run["settings"]["seed"]: run for run in runs if run["recipe"] == recipe}


def rises(mine: Mapping[int, Mapping[str, Any]], beside: Mapping[int, Mapping[str, Any]]) -> list[float]:
    """Percent by which the losses of the seeds that both have are higher."""
    return [100 * (mine[seed]["loss"] / beside[seed]["loss"] - 1) for seed in sorted(mine.keys() & beside.keys())]


def percent(found: Sequence[float]) -> str:
    """Their mean, with its standard error where there are several."""
    if not found:
        return MISSING
    error = f" ± {statistics.stdev(found) / math.sqrt(len(found)):.2f}%" if len(found) > 1 else ""
    return f"{statistics.mean(found):+.2f}%{error}"


def loss(mine: Mapping[int, Mapping[str, Any]]) -> str:
    return f"{statistics.mean(run['loss'] for run in mine.values()):.4f}" if mine else MISSING


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def losses_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Every recipe beside bf16."""
    plain, rows = by_recipe(runs, "bf16"), []
    for name in ("bf16", *LIMITS):
        mine, limit = by_recipe(runs, name), LIMITS.get(name)
        beside = "" if name == "bf16" else percent(rises(mine, plain))
        most = f"{limit:g}%" if limit is not None else "" if name == "bf16" else "reported"
        rows.append([f"`{name}`", f"{len(mine)} of {SEEDS.get(name, 1)}", loss(mine), beside, most])
    return table(["recipe", "seeds", "held-out loss", "beside bf16", "at most"], rows)


def parts_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Recipes without one of their parts, beside bf16 and beside themselves."""
    plain, rows = by_recipe(runs, "bf16"), []
    for name, (recipe, whole) in VARIANTS.items():
        mine = by_recipe(runs, recipe)
        own = rises(mine, by_recipe(runs, VARIANTS[whole][0])) if whole else []
        rows.append(
            [name, str(len(mine)), loss(mine), "" if name == "bf16" else percent(rises(mine, plain)),
             f"{percent(own)}{effect(own)}" if whole else ""]
        )  # fmt: skip
    return table(["trained by", "seeds", "held-out loss", "beside bf16", "beside the whole recipe"], rows)


def effect(found: Sequence[float]) -> str:
    """What several seeds say of a part: nothing where its effect is within two standard errors."""
    if len(found) < 2:
        return ", one seed" if found else ""
    error = statistics.stdev(found) / math.sqrt(len(found))
    return "" if abs(statistics.mean(found)) > 2 * error else ": no effect at this scale"


def curve(runs: Sequence[Mapping[str, Any]]) -> str:
    """Held-out losses beside bf16's over a training's first tokens to its last, as a table of five points."""
    plain, rows = by_recipe(runs, "bf16"), []
    points = next(([at for at, _ in run["held_out"]] for run in plain.values()), [])
    points = points[:: max(1, len(points) // 5)][-5:]
    for name in LIMITS:
        pairs = [(dict(run["held_out"]), dict(plain[seed]["held_out"])) for seed, run in by_recipe(runs, name).items()
                 if seed in plain]  # fmt: skip
        if pairs and points:
            found = [percent([100 * (own[at] / other[at] - 1) for own, other in pairs]) for at in points]
            rows.append([f"`{name}`", *found])
    if not rows:
        return f"Along the training: {MISSING}."
    tokens = [f"{at * runs[0]['tokens'] / runs[0]['settings']['steps'] / 1e6:.1f} M" for at in points]
    return f"The rise along the training, after so many tokens, of 64 windows:\n\n{table(['recipe', *tokens], rows)}"


def made_on(runs: Sequence[Mapping[str, Any]]) -> str:
    """How many tokens, and where."""
    if not runs:
        return f"Runs: {MISSING}."
    sizes = sorted({run["tokens"] for run in runs})
    machines = sorted({run["cpu"] for run in runs})
    return f"{', '.join(f'{size:,}' for size in sizes)} tokens a run; {len(runs)} runs, on {', '.join(machines)}."


def render(losses: Sequence[Mapping[str, Any]], parts: Sequence[Mapping[str, Any]]) -> str:
    """The page, of the kept runs of both claims."""
    some = next(iter([*losses, *parts]), None)
    size = f"{some['parameters'] / 1e6:.1f} M parameters" if some else f"its size is {MISSING}"
    windows = str(some["held_out_windows"]) if some else "the"
    return "\n".join(
        [
            _HEAD.format(parameters=size, windows=windows, missing=MISSING),
            "## Every recipe beside bf16\n",
            made_on(losses) + "\n",
            losses_table(losses) + "\n",
            curve(losses) + "\n",
            "`python benchmarks/recipes_train_to_bf16s_loss.py` makes the missing ones and this table.\n",
            "## What each part of a recipe brings\n",
            "The same training, shorter, with one part of a recipe left out: a rise in the last column is what that"
            "\npart is worth. With one seed it can be chance.\n",
            made_on(parts) + "\n",
            parts_table(parts) + "\n",
            "`python benchmarks/what_each_part_of_a_recipe_brings.py` makes the missing ones and this table.\n",
        ]
    )


def longest(claim: str) -> list[dict[str, Any]]:
    """The kept runs of the greatest number of tokens, which alone can be compared."""
    runs = kept(claim)
    most = max((run["tokens"] for run in runs), default=0)
    return [run for run in runs if run["tokens"] == most]


def write() -> None:
    """Writes the page from what is kept."""
    PAGE.write_text(render(longest(LOSSES), longest(PARTS)))
