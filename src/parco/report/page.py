"""The page: `result.json` set as one self-contained HTML file that needs no network."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from parco.fitting.stages import void, write_whole
from parco.report import chart, comparison, units

if TYPE_CHECKING:
    from parco.fitting.result import Alternative, GroupRow, Result, Sample, StageTime

BLOCK = re.compile(r"^(?P<before>.*?)\b(?P<block>\d+)\b\.?(?P<after>.*)$")


class Cell(NamedTuple):
    """One choice in the overview: its text and the share of the original's bytes that it keeps, in percent."""

    label: str
    kept: float
    title: str


def write(result: Result, path: str | Path) -> Path:
    """Write the page of `result` to `path` and return that path. The same result gives the same bytes."""
    path = Path(path)
    path.write_text(render(result), encoding="utf-8")
    return path


def remake(folder: Path) -> Result:
    """Writes the page of a fitted folder again, from its result.json, which is returned. FileNotFoundError where there
    is none, ValueError where it is of something else.
    """
    file = folder / "result.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no result.json: give a folder that parco train or parco fit made")
    result = json.loads(file.read_text(encoding="utf-8"))
    if not {"original", "fitted", "groups"} <= set(result):
        raise ValueError(f"{file} is of no fit: give a folder that parco train or parco fit made")
    result["folder"] = str(folder)
    write_whole(folder / "report.html", lambda partial: void(write(result, partial)))
    return result  # type: ignore[no-any-return]


def render(result: Result) -> str:
    """The page as text. Everything that came from a model or a user is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("parco.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html.j2").render(
        title=_title(result),
        lead=comparison.lead(result),
        warnings=result["warnings"],
        comparison=comparison.compare(result["original"], result["fitted"], result["prefill_tokens"]),
        comparison_note=_comparison_note(result),
        plans_note=_plans_note(result),
        alternatives=[_alternative(row) for row in sorted(result["alternatives"], key=lambda row: row["loss"])],
        alternatives_note=_alternatives_note(result["data"]),
        alternative_columns=["Size", "Share", "Loss", "KL", "Same token", "Healing"],
        layers_note=_layers_note(result),
        overview=_overview(result["groups"]),
        layers=[_layer(row) for row in result["groups"]],
        sample=_sample(result["sample"]),
        origin=_origin(result),
        command=result["command"],
        usage=_usage(result),
        chart=chart.frontier(result),
        plotly=_packed_plotly(),
        style=_resource("page.css"),
        script=_resource("page.js"),
    )


def _title(result: Result) -> str:
    name = Path(result["model"]).name if "/" in result["model"] else result["model"]
    return f"{name}, {result['fitted']['fraction'] / max(result['original']['fraction'], 1e-9):.2f}× its size"


def _comparison_note(result: Result) -> str:
    data, remainder = result["data"], result["remainder"]
    windows = f" over {data['held_out_windows']} windows of {data['window']} tokens"
    return (
        f"Loss, KL and the most likely token are measured on held-out text{windows}; speeds on this machine with "
        f"{result['threads']} threads, both models in turn in one run. {remainder['explanation']}"
    )


def _plans_note(result: Result) -> str:
    healed = result["heal"]
    healing = f"; the chosen one was healed for {healed['steps']} steps" if healed else ""
    return (
        f"{len(result['frontier'])} plans were solved for{healing}. Lower and further left is better. "
        "KL of the plans is on the windows kept for checking, of the uniform choices on held-out text. "
        "The chosen plan has a ring on both. Point at a mark to read its plan."
    )


def _alternatives_note(data: Mapping[str, Any]) -> str:
    compared = data.get("compared_windows")  # older results do not say it
    windows = "" if compared is None else f" on the first {compared} of {data['held_out_windows']} held-out windows"
    return f"Measured end to end{windows}, smallest loss first"


def _layers_note(result: Result) -> str:
    return (
        "Times are of the kernels alone, measured here. The predicted rise in loss comes from recorded inputs; "
        "the measured error is of each layer's outputs on the inputs that the already changed blocks produce."
    )


def _sample(sample: Sample) -> dict[str, str]:
    """The completions without the white space at their ends, of which models write whole pages."""
    return {
        "prompt": sample["prompt"] if sample["prompt"].strip() else _blank(sample["prompt"]),
        "original": sample["original"].rstrip() or _blank(sample["original"]),
        "fitted": sample["fitted"].rstrip() or _blank(sample["fitted"]),
    }


def _blank(text: str) -> str:
    return f"({len(text)} characters of white space)"


def _alternative(row: Alternative) -> dict[str, Any]:
    healed = f"{row['healed_steps']} steps" if row["healed_steps"] else "none"
    cells = (
        units.size(row["bytes"]),
        units.percent(row["fraction"]),
        units.nats(row["loss"]),
        units.nats(row["kl"]),
        units.percent(row["top1"]),
        healed,
    )
    return {"name": row["name"], "chosen": row["chosen"], "cells": cells}


def _layer(row: GroupRow) -> dict[str, Any]:
    shapes = ", ".join(f"{name.rpartition('.')[2]} {rows}×{columns}" for name, (rows, columns) in _members(row))
    error = row["measured_error"]
    return {
        "name": row["group"],
        "members": shapes,
        "choice": row["method"],
        "kernel": row["kernel"],
        "bytes": units.size(row["bytes"]),
        "kept": units.percent(row["bytes"] / row["original_bytes"]),
        "times": [
            _time(row["decode_seconds"], row["original_decode_seconds"]),
            _time(row["prefill_seconds"], row["original_prefill_seconds"]),
        ],
        "loss": units.rise(row["predicted_loss"]),
        "error": "not measured" if error is None else f"{100 * error:.2g}%",
        "why": f"{len(row['passed'])} passed over",
        "passed": [
            {
                "choice": other["method"],
                "bytes": units.size(other["bytes"]),
                "decode": units.duration(other["decode_seconds"]),
                "prefill": units.duration(other["prefill_seconds"]),
                "loss": units.rise(other["predicted_loss"]),
                "why": other["reason"],
            }
            for other in row["passed"]
        ],
    }


def _time(now: float | None, before: float | None) -> tuple[str, str]:
    return units.duration(now), "" if before is None else f"was {units.duration(before)}"


def _members(row: GroupRow) -> list[tuple[str, list[int]]]:
    """The first few members with their shapes: a block of experts has hundreds, and tied members share one shape."""
    pairs = list(zip(row["members"], row["shapes"], strict=False))
    return pairs if len(pairs) <= 4 else pairs[:3]


def _overview(groups: list[GroupRow]) -> dict[str, Any]:
    """Choices at a glance: a row per block, a column per group. Groups outside the blocks are in the long table."""
    blocks: dict[int, dict[str, Cell]] = {}
    for row in groups:
        match = BLOCK.match(row["group"])
        if match is None:
            continue
        kept = 100 * row["bytes"] / row["original_bytes"]
        column = match["after"] or row["kind"]
        blocks.setdefault(int(match["block"]), {})[column] = Cell(
            row["method"], round(kept, 1), f"{kept:.0f}% of its bytes"
        )
    columns = list(dict.fromkeys(column for cells in blocks.values() for column in cells))
    rows = [{"name": str(block), "cells": [cells.get(c) for c in columns]} for block, cells in sorted(blocks.items())]
    return {"columns": columns, "rows": rows}


def _origin(result: Result) -> list[tuple[str, str]]:
    target, heal = result["target"], result["heal"]
    rows = [
        ("Model", f"{result['model']} ({result['architecture']}, {result['parameters']:,} parameters)"),
        ("Fingerprint", result["fingerprint"][:16]),
        ("Asked for", f"{target['kind']} {target['value']:g}"),
        ("Text", _text(result["data"])),
    ]
    if heal is not None:
        change = f"KL on the check windows {units.nats(heal['kl_before'])} → {units.nats(heal['kl_after'])}"
        rows.append(("Healing", f"{heal['steps']} steps of {heal['tokens_per_step']:,} tokens, {change}"))
    return [
        *rows,
        ("Machine", _machine(result["machine"])),
        ("Threads", str(result["threads"])),
        ("Seed", str(result["seed"])),
        (
            "Versions",
            ", ".join(
                f"{name} {version}" for name, version in ({"parco": result["parco"]} | result["versions"]).items()
            ),
        ),
        ("Time spent", _time_spent(result["stages"])),
    ]


def _text(data: Mapping[str, Any]) -> str:
    generated = f", {data['generated_windows']} of them written by the model" if data.get("generated_windows") else ""
    return (
        f"{data['source']}: {data['calibration_windows']} windows of {data['window']} tokens to calibrate{generated}, "
        f"{data['check_windows']} to check, {data['held_out_windows']} held out; sha256 {data['sha256'][:16]}"
    )


def _time_spent(stages: list[StageTime]) -> str:
    """Seconds by name of stage, a stage that ran several times once, in the order in which they first ran."""
    spent: dict[str, float] = {}
    for stage in stages:
        spent[stage["stage"]] = spent.get(stage["stage"], 0.0) + stage["seconds"]
    kept = list(dict.fromkeys(stage["stage"] for stage in stages if stage["resumed"]))
    earlier = f"; of an earlier run: {', '.join(kept)}" if kept else ""
    return ", ".join(f"{name} {units.duration(seconds)}" for name, seconds in spent.items()) + earlier


def _machine(machine: Mapping[str, Any]) -> str:
    parts = [str(machine.get("cpu", "unknown CPU"))]
    if "cores" in machine:
        parts.append(f"{machine['cores']} cores")
    if machine.get("isas"):
        parts.append("instruction sets " + " ".join([*machine["isas"], *machine.get("features", ())]))
    if machine.get("memory"):
        parts.append(f"{units.size(machine['memory'])} memory")
    return ", ".join([*parts, *machine.get("gpus", ())])


def _usage(result: Result) -> str:
    folder = result["folder"] or "DIR"
    return (
        "import parco\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({folder!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({folder!r})"
    )


def _resource(name: str) -> str:
    return (resources.files("parco.report") / name).read_text(encoding="utf-8")


@cache
def _packed_plotly() -> str:
    """Plotly's JavaScript, gzipped and in base64: a third of its size in the page, and nothing in it to escape."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()
