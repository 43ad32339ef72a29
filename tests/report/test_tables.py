from __future__ import annotations

from io import StringIO

from rich.console import Console, RenderableType
from tests.report import example

from parco.report import comparison, tables
from parco.report.explanation import Explained


def printed(table: RenderableType, width: int = 160) -> str:
    console = Console(file=StringIO(), width=width, markup=False, highlight=False)
    console.print(table)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_the_comparison_has_a_line_per_quantity():
    result = example.result()
    lines = printed(
        tables.comparison_table(result["original"], result["fitted"], result["prefill_tokens"])
    ).splitlines()
    decode = next(line for line in lines if line.startswith("Decode"))
    assert decode.split() == ["Decode", "tok/s,", "one", "sequence", "190", "251", "1.32×"]
    assert len(lines) == 9


def test_a_slower_model_is_called_worse_and_an_equal_one_neither():
    original, fitted = example.result()["original"], example.result()["fitted"]
    fitted["decode"], fitted["prefill"] = 0.9 * original["decode"], 1.004 * original["prefill"]
    verdicts = {row.name: row.verdict for row in comparison.compare(original, fitted)}
    assert verdicts["Decode"] == "bad"
    assert verdicts["Prefill"] == ""
    assert verdicts["Size"] == "good"


def test_a_lookup_that_was_not_timed_has_no_time():
    row = example.result()["groups"][0]
    row["decode_seconds"] = row["original_decode_seconds"] = None
    costs = dict.fromkeys(printed(tables.group_table(Explained("embed", (), row))).splitlines())
    assert "one token" in [line.strip() for line in costs]


def test_a_narrow_terminal_keeps_every_character():
    row = example.result()["groups"][1]
    narrow = printed(tables.passed_table(row), width=60)
    assert "…" not in narrow
    assert "elsewhere" in narrow
