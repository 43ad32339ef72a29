"""What `parco bench --whole` found, as a table and as a page whose axes end at the machine's peak."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from parco.report import bars, units

if TYPE_CHECKING:
    from parco.bench import ModelRow, ModelsReport

TITLES = {"prefill": "prefill of {prompt}", "decode": "decode", "generate": "generate()"}


def table(report: ModelsReport) -> Table:
    """Contenders down, kinds of work across: tokens per second, times the first, times llama.cpp on the same bits."""
    made = Table(
        title=f"{report['model']}: tokens/s, times {report['rows'][0]['contender']}, times llama.cpp on the same bits, "
        "both in the same rounds",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    kinds = list(dict.fromkeys(row["kind"] for row in report["rows"]))
    made.add_column("")
    for kind in kinds:
        made.add_column(TITLES[kind].format(**report), justify="right")
    made.add_column("read a step", justify="right")
    for name in dict.fromkeys(row["contender"] for row in report["rows"]):
        mine = {row["kind"]: row for row in report["rows"] if row["contender"] == name}
        size = units.size(next(iter(mine.values()))["read_bytes"])
        made.add_row(name, *[_cell(mine[kind]) if kind in mine else "" for kind in kinds], size)
    return made


def _cell(row: ModelRow) -> Text:
    times = row["times_rival"]
    beside = " " * 7 if times is None else f"{times:6.2f}x"
    style = "" if times is None else "green" if times > 1.05 else "red" if times < 0.95 else ""
    return Text.assemble(f"{row['tokens_per_second']:.1f}", (f"{row['times_first']:7.2f}x", "dim"), (beside, style))


def write(report: ModelsReport, path: Path) -> None:
    """One self-contained page."""
    figure(report).write_html(path, include_plotlyjs=True, full_html=True)


def figure(report: ModelsReport) -> Any:
    """Bars: bytes of weights read per second for a decode, multiply-adds for a prefill; axes end at the peak."""
    from plotly.subplots import make_subplots

    peaks = dict(report["peaks"])
    read = peaks.pop("read_bytes_per_second")
    plots = {
        "decode": (read, "GB_per_s", "GB of weights read per second"),
        "prefill": (max(peaks.values()), "G_multiply_adds_per_s", "10⁹ multiply-adds by weights per second"),
    }
    drawn = make_subplots(rows=len(plots), cols=1, vertical_spacing=0.2)
    for index, (kind, (top, value, unit)) in enumerate(plots.items(), start=1):
        mine = [row for row in report["rows"] if row["kind"] == kind]
        names = [row["contender"] for row in mine]
        texts = [f"{row['tokens_per_second']:.1f} tokens/s" for row in mine]
        title = f"{TITLES[kind].format(**report)}: {unit}"
        bars.add(drawn, index, names, [row[value] for row in mine], title, top, texts)
    found = report["machine"]
    title = f"{report['model']} on {found['cpu']}, {report['threads']} threads, {found['isa']}"
    return bars.finish(drawn, title, len(plots))
