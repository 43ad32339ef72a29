"""`parco explain`: what was chosen for each layer, why, and which kernel runs it."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from parco.cli import terminal

if TYPE_CHECKING:
    from parco.fitting.result import Result
    from parco.report.explanation import Explained

PREFILL_TOKENS = 512


def explain(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A folder that parco fit made.")],
    layer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", show_default=False, help="Only this layer or group, with all that was passed over."
        ),
    ] = None,
    as_json: terminal.Json = False,
    debug: terminal.Debug = False,
) -> None:
    """Show what was chosen for every group of layers, its predicted and measured cost, and the kernel that runs it."""
    terminal.quiet_libraries()
    from parco import hub
    from parco.report.explanation import explain_groups

    loaded = hub.load(model)
    terminal.show_notes(loaded.notes)
    record = loaded.path / "result.json"
    result: Result | None = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
    rows = result["groups"] if result else []
    tokens = result["prefill_tokens"] if result else PREFILL_TOKENS
    explained = explain_groups(loaded.model, rows, tokens, only=layer)
    if as_json:
        terminal.print_json([one.to_json() for one in explained])
    elif layer is None:
        _show_all(explained, str(loaded.path), fitted=bool(rows))
    else:
        for one in explained:
            _show_one(one, tokens)


def _show_all(explained: list[Explained], folder: str, fitted: bool) -> None:
    from parco.report import tables

    out = terminal.console()
    out.print(tables.layers_table(explained))
    out.print()
    if fitted:
        out.print("--layer NAME shows what was passed over for one of them, and why.")
    elif any(member.decode for one in explained for member in one.members):
        out.print(f"{folder} holds no result.json of a fit, which would say why. --layer NAME shows one's kernels.")
    else:
        again = shlex.join(["parco", "fit", folder])
        out.print(f"{folder} was not fitted: every matrix is as it was. {again} makes it smaller.")


def _show_one(one: Explained, prefill_tokens: int) -> None:
    from parco.kernels.table import NATIVE
    from parco.report import tables

    out = terminal.console()
    out.print(tables.group_table(one))
    if one.fitted is not None and one.fitted["passed"]:
        out.print()
        out.print(tables.passed_table(one.fitted))
    for member in one.members:
        out.print()
        out.print(f"{member.name}: {member.stored}")
        for title, found in (("one token", member.decode), (f"a prompt of {prefill_tokens} tokens", member.prefill)):
            text = "\n".join(str(explanation) for explanation in found) or NATIVE
            out.print(f"  {title}")
            out.print("\n".join(f"    {line}" for line in text.splitlines()))
