"""docs/concepts/compression.md, made of the results files of both claims about what compressed models keep."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from interleaved import RESULTS

PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "compression.md"
FACTORS, PRUNING = "factors_keep_more_than_published_methods", "pruning_orders_as_published"
MODELS = {
    "llama": "the Llama of 10 M parameters that comes with parco",
    "llama with uneven channels": "the same Llama, computing the same, with what its norms put out spread log-normally "
    "by a factor of four, and the columns that read it divided by as much",
    "gpt2": "a GPT-2 of 3 M parameters, trained for it on 12 M tokens of the same text",
}
TEXTS = {"held_out": "held-out text", "other_text": "other text"}

_HEAD = """# What factors and zeros keep

<!-- Written by benchmarks/{factors}.py and benchmarks/{pruning}.py. -->

Perplexity of two small models whose matrices inside the blocks are replaced by factors, or half of whose numbers are
zeros; embeddings and head stay. Both are calibrated on a part of their own text, the sources of Python's standard
library, and judged on two texts: sources of it that neither training nor calibration has seen, and PyTorch's
`functional.py`, which others wrote in another style.
"""
_FACTORS = """## Low rank

20, 40 and 60% of the parameters of those matrices are removed. Plain SVD, FWSVD, ASVD and SVD-LLM as published: one
ratio for all, on the original's inputs. *Ours* solves each block on what the changed blocks before it produce, towards
the original's outputs, with ranks allocated over the whole model; with joint bases
([`joint(...)`](methods.md#one-right-factor-for-a-group)) q, k and v, and gate and up, have one right factor. *Healed*
is the same model after {steps} steps of a fit's healing, the same for all rows.
Empty cells are not measured yet.
"""
_PARTS = """What each part of ours brings, not healed:
"""
_PRUNING = """## Zeros

Half the numbers of every row, and 2 of every 4 along it, are zeros. Block by block on what the pruned blocks before
produce, each towards its own outputs, as published; *aimed* is SparseGPT towards the outputs of the original model, as
a fit does it. Nothing is healed.
"""


def _rows(claim: str) -> list[dict[str, Any]]:
    file = RESULTS / f"{claim}.json"
    return json.loads(file.read_text())["rows"] if file.exists() else []


def _found(rows: Sequence[Mapping[str, Any]], text: str, **key: object) -> str:
    return next((f"{row[text]:,.2f}" for row in rows if key.items() <= row.items()), "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *(row for row in rows if any(row[1:]))]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def _dense(rows: Sequence[Mapping[str, Any]], model: str, **key: object) -> str:
    both = " and ".join(f"{_found(rows, text, model=model, **key)} on the {named}" for text, named in TEXTS.items())
    return f"### {MODELS[model][0].upper()}{MODELS[model][1:]}\n\nDense: {both}."


def factors(rows: Sequence[Mapping[str, Any]], model: str) -> str:
    """The tables of one model: methods before and after healing, then the parts of ours."""
    removed = sorted({row["removed"] for row in rows} - {0.0})
    names = list(dict.fromkeys(row["method"] for row in rows if row["model"] == model and row["removed"]))
    parts_of_ours = {name for name in names if name.startswith(("ours without", "ours with refit"))}
    whole = [name for name in names if name not in parts_of_ours and not name.endswith(", healed")]

    def line(name: str, text: str, kinds: Sequence[str]) -> list[str]:
        return [
            name,
            *(_found(rows, text, model=model, removed=r, method=name + kind) for kind in kinds for r in removed),
        ]

    parts = [_dense(rows, model, method="dense")]
    columns = [f"{r:.0%}{kind}" for kind in ("", ", healed") for r in removed]
    for text, named in TEXTS.items():
        lines = [line(name, text, ("", ", healed")) for name in whole]
        parts.append(_table([f"{named}, removed:", *columns], lines))
    mine = [name for name in names if name.startswith("ours") and not name.endswith(", healed")]
    both = [f"{r:.0%}, {named}" for named in TEXTS.values() for r in removed]
    lines = [[*line(name, "held_out", ("",)), *line(name, "other_text", ("",))[1:]] for name in mine]
    return "\n\n".join([*parts, _PARTS.strip(), _table(["", *both], lines)])


def pruning(rows: Sequence[Mapping[str, Any]], model: str) -> str:
    patterns = list(dict.fromkeys(row["zeros"] for row in rows if row["zeros"] != "none"))
    scores = list(dict.fromkeys(row["score"] for row in rows if row["score"] != "dense"))
    head = ["", *(f"{pattern}, {named}" for named in TEXTS.values() for pattern in patterns)]
    lines = [
        [score, *(_found(rows, text, model=model, zeros=each, score=score) for text in TEXTS for each in patterns)]
        for score in scores
    ]
    return f"{_dense(rows, model, score='dense')}\n\n{_table(head, lines)}"


def write(steps: int) -> None:
    """The page anew, of what the results files hold."""
    parts = [_HEAD.format(factors=FACTORS, pruning=PRUNING)]
    tables: tuple[tuple[str, str, Callable[..., str]], ...] = (
        (FACTORS, _FACTORS.format(steps=steps), factors),
        (PRUNING, _PRUNING, pruning),
    )
    for claim, text, tabled in tables:
        rows = _rows(claim)
        models = [model for model in MODELS if any(row["model"] == model for row in rows)]
        command = f"`python benchmarks/{claim}.py` makes these tables."
        parts += [text, *(f"{tabled(rows, model)}\n" for model in models), f"{command}\n"]
    PAGE.write_text("\n".join(parts), encoding="utf-8")
