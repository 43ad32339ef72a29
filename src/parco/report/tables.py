"""The terminal's tables, in Rich."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from parco.report import comparison, units

if TYPE_CHECKING:
    from parco.fitting.result import Column, GroupRow
    from parco.report.explanation import Explained

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
    for name, value in comparison.describe(column):
        table.add_row(name, value)
    return table


def layers_table(explained: Iterable[Explained]) -> Table:
    """Every group's choice, what it costs, and the kernel that runs it; cells that no fit measured are empty."""
    names = ("group", "choice", "bytes", "kept", "predicted rise", "measured error", "one token", "kernel here")
    table = _table([(name, "left" if name in ("group", "choice", "kernel here") else "right") for name in names])
    for one in explained:
        costs = [""] * 5 if one.fitted is None else _costs(one.fitted)
        table.add_row(Text(one.group), Text(one.choice), *costs, Text(one.kernels))
    return table


def group_table(one: Explained) -> Table:
    """One group's choice and costs, one a line."""
    names = ("bytes", "kept", "predicted rise", "measured error", "one token")
    costs = [] if one.fitted is None else list(zip(names, _costs(one.fitted), strict=True))
    return pairs_table([("group", one.group), ("choice", one.choice), *costs])


def _costs(row: GroupRow) -> list[str]:
    error, before = row["measured_error"], row["original_decode_seconds"]
    return [
        units.size(row["bytes"]),
        units.percent(row["bytes"] / row["original_bytes"]),
        units.rise(row["predicted_loss"]),
        "" if error is None else f"{100 * error:.2g}%",
        "" if before is None else f"{units.duration(before)} → {units.duration(row['decode_seconds'])}",
    ]


def passed_table(row: GroupRow) -> Table:
    """What one group passed over, and why."""
    table = _table(
        [
            ("passed over", "left"),
            ("bytes", "right"),
            ("predicted rise", "right"),
            ("one token", "right"),
            ("why", "left"),
        ]
    )
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
