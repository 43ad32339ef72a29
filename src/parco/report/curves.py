"""What `parco train` found: a table, and a page with the losses, the gaps, the speeds and the memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from parco.report import tables, units

if TYPE_CHECKING:
    from parco.trainer import Gap, RunResult


def run_table(run: RunResult) -> Table:
    """One run."""
    return tables.pairs_table(
        [
            ("recipe", run["recipe"]),
            ("held-out loss", f"{units.nats(run['loss'])} nats per token, {run['held_out_windows']} windows"),
            ("tokens", f"{run['tokens']:,}"),
            ("speed", f"{units.speed(run['tokens_per_second'])}, {units.percent(run['mfu'])} of the bf16 peak"),
            ("peak memory", units.size(run["peak_memory"])),
            ("skipped steps", str(run["skipped"])),
            ("ran on", run["runs_on"]),
        ]
    )


def gap_table(gaps: Sequence[Gap]) -> Table:
    """Recipes side by side, the first is what the others are beside."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    names = ("recipe", "held-out loss", f"beside {gaps[0]['recipe']}", "speed", "", "of bf16 peak", "peak memory")
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
    """Losses over tokens; where there are several recipes also each one's gap over tokens, speed and memory."""
    import plotly.graph_objects as graph
    from plotly.colors import qualitative
    from plotly.subplots import make_subplots

    several = len(gaps) > 1
    heights = [0.34, 0.3, 0.18, 0.18] if several else [1.0]
    drawn = make_subplots(rows=len(heights), cols=1, row_heights=heights, vertical_spacing=0.09)
    colors = {gap["recipe"]: qualitative.D3[i % len(qualitative.D3)] for i, gap in enumerate(gaps)}
    first = {
        run["settings"]["seed"]: {step: loss for step, loss in run["held_out"]}  # noqa: C416
        for run in runs
        if run["recipe"] == gaps[0]["recipe"]
    }
    shown: set[str] = set()
    for run in runs:
        name, seed = run["recipe"], run["settings"]["seed"]
        step = run["tokens"] / run["settings"]["steps"]
        look: dict[str, Any] = {
            "name": name,
            "legendgroup": name,
            "showlegend": name not in shown,
            "line": {"color": colors[name]},
            "hovertext": f"seed {seed}",
        }
        shown.add(name)
        steps, losses = zip(*run["held_out"], strict=True)
        drawn.add_trace(graph.Scatter(x=[s * step for s in steps], y=losses, mode="lines+markers", **look), 1, 1)
        if not several:
            steps, losses = zip(*run["train"], strict=True)
            line = look | {"name": "training", "line": {"color": "#9a9a9a"}, "showlegend": True}
            drawn.add_trace(graph.Scatter(x=[s * step for s in steps], y=losses, mode="lines", **line), 1, 1)
        elif name != gaps[0]["recipe"]:
            points = [(s * step, 100 * (y / first[seed][s] - 1)) for s, y in run["held_out"] if s in first[seed]]
            x, y = zip(*points, strict=True)
            drawn.add_trace(graph.Scatter(x=x, y=y, mode="lines+markers", **look | {"showlegend": False}), 2, 1)
    drawn.update_yaxes(title="held-out loss, nats per token", row=1, col=1)
    drawn.update_xaxes(title="tokens", row=1, col=1)
    if several:
        drawn.update_yaxes(title=f"loss beside {gaps[0]['recipe']}, %", zeroline=True, row=2, col=1)
        drawn.update_xaxes(title="tokens", row=2, col=1)
        bars = (("tokens_per_second", 1.0, "tokens per second"), ("peak_memory", 1e9, "peak memory, GB"))
        for row, (field, unit, title) in enumerate(bars, start=3):
            names = [gap["recipe"] for gap in gaps]
            bar = graph.Bar(
                x=names,
                y=[gap[field] / unit for gap in gaps],
                marker={"color": [colors[name] for name in names]},
                showlegend=False,
            )
            drawn.add_trace(bar, row, 1)
            drawn.update_yaxes(title=title, rangemode="tozero", row=row, col=1)
    one = runs[0]
    title = f"{one['parameters']:,} parameters, {one['tokens']:,} tokens; {one['cpu']}, {one['threads']} threads"
    drawn.update_layout(title=title, height=1400 if several else 600, template="plotly_white")
    return drawn
