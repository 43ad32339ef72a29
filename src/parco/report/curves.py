"""What `parco train` and `parco tune` found: a table, and a page with losses, gaps, speeds and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from parco.report import tables, units

if TYPE_CHECKING:
    from parco.trainer import Gap, RunResult, SoFar, TuneResult

_COLORS = ("#3d6fb6", "#d1652b", "#3f8f4f", "#b03a4c", "#7a5ca8", "#8a6a4f", "#c46fa8", "#6b6b6b", "#a8a033", "#3aa0a8")
_TOKENS = "tokens trained on"


def run_table(run: RunResult) -> Table:
    """One run."""
    return tables.pairs_table(
        [
            ("recipe", run["recipe"]),
            ("held-out loss", f"{units.nats(run['loss'])} nats per token, {run['held_out_windows']} windows"),
            ("tokens", f"{run['tokens']:,}"),
            ("speed", f"{units.speed(run['tokens_per_second'])}, {units.percent(run['mfu'])} of the machine's peak"),
            ("peak memory", units.size(run["peak_memory"])),
            ("skipped steps", str(run["skipped"])),
            ("ran on", run["runs_on"]),
        ]
    )


def tune_table(run: TuneResult) -> Table:
    """One tuning."""
    share = run["trained"] / run["parameters"]
    kept = "before the first step" if run["best_step"] == 0 else f"at step {run['best_step']}"
    rows = [
        ("method", run["method"]),
        ("base", run["base"] or "as it was"),
        ("held-out loss", f"{units.nats(run['before'])} → {units.nats(run['loss'])} nats per token, least {kept}"),
        ("trained", f"{run['trained']:,} of {run['parameters']:,} parameters, {units.percent(share)}"),
        ("tokens", f"{run['tokens']:,}, {units.percent(run['filled'])} of the windows filled"),
        ("speed", f"{units.speed(run['tokens_per_second'])}, {units.percent(run['mfu'])} of the machine's peak"),
        ("peak memory", units.size(run["peak_memory"])),
        ("ran on", run["runs_on"]),
    ]
    if run["examples"]:
        said = f"{run['examples']:,}, {run['cut']:,} cut, {run['left_out']:,} left out"
        rows.insert(4, ("examples", said))
    return tables.pairs_table(rows)


def going_table(going: SoFar) -> Table:
    """A run at its last checkpoint."""
    run = going["run"]
    losses = [
        (name, points[-1]) for name, points in (("training", run["train"]), ("held-out", run["held_out"])) if points
    ]
    return tables.pairs_table(
        [
            ("recipe", run["recipe"]),
            ("at step", f"{going['step']} of {going['steps']}"),
            *((f"{name} loss", f"{units.nats(loss)} nats per token, step {step}") for name, (step, loss) in losses),
            ("speed", units.speed(run["tokens_per_second"])),
            ("skipped steps", str(run["skipped"])),
            ("ran on", run["runs_on"]),
        ]
    )


def gap_table(gaps: Sequence[Gap]) -> Table:
    """Recipes side by side, the first is what the others are beside."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    names = ("recipe", "held-out loss", f"beside {gaps[0]['recipe']}", "speed", "", "of peak", "peak memory")
    for name in (*names, "skipped"):
        table.add_column(name, justify="left" if name == "recipe" else "right", overflow="fold")
    for gap in gaps:
        table.add_row(
            gap["recipe"],
            units.nats(gap["loss"]),
            rise(gap) if gap is not gaps[0] else "",
            units.speed(gap["tokens_per_second"]),
            Text(units.times(gap["times"]) if gap is not gaps[0] else "", "dim"),
            units.percent(gap["mfu"]),
            units.size(gap["peak_memory"]),
            str(gap["skipped"]) if gap["skipped"] else "",
        )
    return table


def rise(gap: Gap) -> str:
    """The relative rise in loss, with its standard error where there are several seeds: `+0.12% ± 0.03%`."""
    error = "" if gap["error"] is None else f" ± {100 * gap['error']:.2f}%"
    return f"{100 * gap['gap']:+.2f}%{error}"


def write(runs: Sequence[RunResult], gaps: Sequence[Gap], path: Path) -> None:
    """One self-contained page."""
    figure(runs, gaps).write_html(path, include_plotlyjs=True, full_html=True)


def figure(runs: Sequence[RunResult], gaps: Sequence[Gap]) -> Any:
    """Losses over tokens; of several recipes also each one's gap, speed and memory, of one what its formats lose."""
    from plotly.subplots import make_subplots

    several = len(gaps) > 1
    watched = runs[0]["watched"] if not several else []
    heights = [0.34, 0.3, 0.18, 0.18] if several else [0.5, 0.5] if watched else [1.0]
    drawn = make_subplots(rows=len(heights), cols=1, row_heights=heights, vertical_spacing=0.09)
    colors = {gap["recipe"]: _COLORS[i % len(_COLORS)] for i, gap in enumerate(gaps)}
    _add_losses(drawn, runs, colors)
    if several:
        _add_gaps(drawn, runs, gaps[0]["recipe"], colors)
        _add_bars(drawn, gaps, colors)
    elif watched:
        _add_watched(drawn, runs[0])
    one = runs[0]
    where = f"{escape(one['cpu'])}, {one['threads']} threads"
    title = f"{one['parameters']:,} parameters, {one['tokens']:,} tokens; {where}"
    drawn.update_layout(title=title, height=200 + 300 * len(heights), template="plotly_white")
    return drawn


def _tokens(run: RunResult, points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Points of [step, number] as tokens and numbers."""
    step = run["tokens"] / run["settings"]["steps"]
    return [at * step for at, _ in points], [value for _, value in points]


def _add_losses(drawn: Any, runs: Sequence[RunResult], colors: Mapping[str, str]) -> None:
    import plotly.graph_objects as graph

    shown: set[str] = set()
    for run in runs:
        x, y = _tokens(run, run["held_out"])
        look = _look(run, colors) | {"showlegend": run["recipe"] not in shown}
        look |= {"name": "held out"} if len(runs) == 1 else {}
        shown.add(run["recipe"])
        drawn.add_trace(graph.Scatter(x=x, y=y, mode="lines+markers", **look), 1, 1)
    if len(runs) == 1:
        x, y = _tokens(runs[0], runs[0]["train"])
        drawn.add_trace(graph.Scatter(x=x, y=y, mode="lines", name="training", line={"color": "#9a9a9a"}), 1, 1)
    judged = "loss" if len(runs) == 1 else "held-out loss"
    drawn.update_yaxes(title=f"{judged}, nats per token", row=1, col=1)
    drawn.update_xaxes(title=_TOKENS, row=1, col=1)


def _look(run: RunResult, colors: Mapping[str, str]) -> dict[str, Any]:
    name = run["recipe"]
    return {
        "name": name,
        "legendgroup": name,
        "line": {"color": colors[name]},
        "hovertext": f"seed {run['settings']['seed']}",
    }


def _add_gaps(drawn: Any, runs: Sequence[RunResult], first: str, colors: Mapping[str, str]) -> None:
    import plotly.graph_objects as graph

    beside: dict[int, dict[float, float]] = {
        run["settings"]["seed"]: {at: loss for at, loss in run["held_out"]}  # noqa: C416
        for run in runs
        if run["recipe"] == first
    }
    for run in runs:
        losses = beside.get(run["settings"]["seed"], {})
        points = [(at, 100 * (loss / losses[at] - 1)) for at, loss in run["held_out"] if at in losses]
        if run["recipe"] != first and points:
            x, y = _tokens(run, points)
            look = _look(run, colors) | {"showlegend": False}
            drawn.add_trace(graph.Scatter(x=x, y=y, mode="lines+markers", **look), 2, 1)
    drawn.update_yaxes(title=f"loss beside {first}, %", zeroline=True, row=2, col=1)
    drawn.update_xaxes(title=_TOKENS, row=2, col=1)


def _add_bars(drawn: Any, gaps: Sequence[Gap], colors: Mapping[str, str]) -> None:
    import plotly.graph_objects as graph

    names = [gap["recipe"] for gap in gaps]
    bars = (("tokens_per_second", 1.0, "tokens per second"), ("peak_memory", 1e9, "peak memory, GB"))
    for row, (field, unit, title) in enumerate(bars, start=3):
        values = [gap[field] / unit for gap in gaps]
        marker = {"color": [colors[name] for name in names]}
        drawn.add_trace(graph.Bar(x=names, y=values, marker=marker, showlegend=False), row, 1)
        drawn.update_yaxes(title=title, rangemode="tozero", row=row, col=1)


def _add_watched(drawn: Any, run: RunResult) -> None:
    """Of each operand the signal to noise of the layer that loses most; the layer's name is in the hover text."""
    import plotly.graph_objects as graph

    places = dict.fromkeys((row["product"], row["operand"]) for row in run["watched"])
    for index, (product, operand) in enumerate(places):
        mine = [row for row in run["watched"] if (row["product"], row["operand"]) == (product, operand)]
        x, _ = _tokens(run, [(row["step"], 0.0) for row in mine])
        trace = graph.Scatter(
            x=x,
            y=[row["worst_snr_db"] for row in mine],
            mode="lines+markers",
            name=f"{product}: {operand}",
            line={"color": _COLORS[index % len(_COLORS)]},
            hovertext=[
                f"{escape(row['worst_layer'])}; over all layers {row['underflow']:.1%} became 0, "
                f"{row['saturated']:.1%} beyond the greatest"
                for row in mine
            ],
        )
        drawn.add_trace(trace, 2, 1)
    drawn.update_yaxes(title="signal to noise of the worst layer, dB", row=2, col=1)
    drawn.update_xaxes(title=_TOKENS, row=2, col=1)
