"""What `parco bench` found, as tables and as one page with a plot whose axes end at the machine's peak."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from parco.report import bars, units

if TYPE_CHECKING:
    from parco.bench import Report, Row


def tables(report: Report) -> list[Table]:
    """One table for each shape: contenders down, rows across; time, times PyTorch's bf16, and share of the peak."""
    heights = list(dict.fromkeys(row["rows"] for row in report["rows"]))
    made: list[Table] = []
    for shape in dict.fromkeys(row["shape"] for row in report["rows"]):
        mine = [row for row in report["rows"] if row["shape"] == shape]
        layers = f", {mine[0]['layers']} layers" if mine[0]["layers"] > 1 else ""
        shown = "time, times PyTorch's bf16 in the same rounds, share of peak"
        table = Table(
            title=f"{shape[0]} outputs x {shape[1]} inputs{layers}: {shown}",
            title_justify="left",
            box=None,
            pad_edge=False,
        )
        table.add_column("")
        for height in heights:
            table.add_column(f"{height} row{'s' if height > 1 else ''}", justify="right")
        for name in dict.fromkeys(row["contender"] for row in mine):
            cells = {row["rows"]: row for row in mine if row["contender"] == name}
            table.add_row(name, *[_cell(cells[height]) if height in cells else "" for height in heights])
        made.append(table)
    return made


def _cell(row: Row) -> Text:
    style = "green" if row["times_bf16"] > 1.05 else "red" if row["times_bf16"] < 0.95 else ""
    return Text.assemble(
        units.duration(row["median_us"] / 1e6),
        (f"{row['times_bf16']:7.2f}x", style),
        (f"{100 * row['of_peak']:5.0f}%", "dim"),
    )


def write(report: Report, path: Path) -> None:
    """One self-contained page: for each number of rows, all layers of the model together, a bar for each contender."""
    figure(report).write_html(path, include_plotlyjs=True, full_html=True)


def figure(report: Report) -> Any:
    """The plot: bytes read per second for few rows, multiply-adds per second for many; the axis ends at the peak."""
    from plotly.subplots import make_subplots

    heights = list(dict.fromkeys(row["rows"] for row in report["rows"]))
    peaks = report["peaks"]
    drawn = make_subplots(rows=len(heights), cols=1, vertical_spacing=0.35 / max(len(heights), 2))
    for index, height in enumerate(heights, start=1):
        mine = [row for row in report["rows"] if row["rows"] == height]
        reading = height < 16
        partly = {one["contender"] for one in report["missing"]}  # a bar stands for all layers
        names = [name for name in dict.fromkeys(row["contender"] for row in mine) if name not in partly]
        values = {name: _rate(mine, name, reading) for name in names}
        elements = {row["element"] for row in mine}
        top = peaks["read_bytes_per_second"] if reading else max(peaks[element] for element in elements)
        unit = "GB read per second" if reading else "10⁹ multiply-adds per second"
        title = f"{height} row{'s' if height > 1 else ''} of x: {unit}"
        bars.add(drawn, index, names, [values[name] for name in names], title, top)
    found = report["machine"]
    return bars.finish(drawn, f"{found['cpu']}, {report['threads']} threads, {found['isa']}", len(heights))


def _rate(rows: list[Row], name: str, reading: bool) -> float:
    """Of all layers one after the other: the sum of the work over the sum of the times, in 10⁹ per second."""
    mine = [row for row in rows if row["contender"] == name]
    seconds = sum(row["layers"] * row["median_us"] for row in mine) / 1e6
    if reading:
        return sum(row["layers"] * row["bytes"] for row in mine) / seconds / 1e9
    work = sum(row["layers"] * row["rows"] * row["shape"][0] * row["shape"][1] for row in mine)
    return work / seconds / 1e9
