"""The terminal's tables, in Rich."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from parco.fitting.result import Column, GroupRow
from parco.report import comparison, units

STYLES = {"good": "green", "bad": "red", "": ""}


def comparison_table(
    original: Column, fitted: Column, prefill_tokens: int | None = None, names: tuple[str, str] = ("original", "fitted")
) -> Table:
    """Two models side by side: size, loss, agreement, speed, memory."""
    table = _table([("", "left"), (names[0], "right"), (names[1], "right"), ("change", "right")])
    for row in comparison.compare(original, fitted, prefill_tokens):
        name = Text.assemble(row.name, (f"  {row.note}" if row.note else "", "dim"))
        table.add_row(name, row.original, row.fitted, Text(row.change, STYLES[row.verdict]))
    return table


def column_table(column: Column) -> Table:
    """One model alone."""
    table = _table([("", "left"), (column["name"], "right")])
    for row in comparison.describe(column):
        table.add_row(row.name, row.value)
    return table


def layers_table(groups: Iterable[GroupRow]) -> Table:
    """Every group's choice and what it costs."""
    table = _table(
        [
            ("group", "left"),
            ("choice", "left"),
            ("bytes", "right"),
            ("kept", "right"),
            ("predicted rise", "right"),
            ("measured error", "right"),
            ("one token", "right"),
            ("kernel", "left"),
        ]
    )
    for row in groups:
        error = row["measured_error"]
        table.add_row(
            Text(row["group"]),
            Text(row["method"]),
            units.size(row["bytes"]),
            units.percent(row["bytes"] / row["original_bytes"]),
            units.rise(row["predicted_loss"]),
            "" if error is None else f"{100 * error:.2g}%",
            f"{units.duration(row['original_decode_seconds'])} → {units.duration(row['decode_seconds'])}",
            Text(row["kernel"]),
        )
    return table


def passed_table(row: GroupRow) -> Table:
    """What one group passed over, and why."""
    table = _table([("passed over", "left"), ("bytes", "right"), ("predicted rise", "right"), ("one token", "right"), ("why", "left")])
    for other in row["passed"]:
        table.add_row(
            Text(other["method"]),
            units.size(other["bytes"]),
            units.rise(other["predicted_loss"]),
            units.duration(other["decode_seconds"]),
            Text(other["reason"]),
        )
    return table


def pairs_table(pairs: Iterable[tuple[str, str]]) -> Table:
    """Names and values, one pair a line."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(name, Text(value))
    return table


def _table(columns: Sequence[tuple[str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name, justify in columns:
        # Folding keeps every character of a name on a narrow terminal; Rich would otherwise cut it with an ellipsis.
        table.add_column(name, justify="left" if justify == "left" else "right", overflow="fold")
    return table
