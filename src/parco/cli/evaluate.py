"""`parco eval`: loss and speed of a model, alone or against another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from parco.cli import terminal


def evaluate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A fitted folder, or any Transformers checkpoint.")],
    data: Annotated[
        Path | None,
        typer.Option(metavar="TEXT", show_default=False, help="A text file to judge on. Without it: the held-out text that comes with parco."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            show_default=False,
            help="Another model with the same tokenizer, usually the original: KL and agreement are measured against it, speeds in turn with it.",
        ),
    ] = None,
    as_json: terminal.Json = False,
    debug: terminal.Debug = False,
) -> None:
    """Measure the loss, perplexity, speed and memory of the model in DIR on a text.

    The loss is the mean over every token of the text but the first of each window, as a plain Transformers loop computes it.
    """
    terminal.quiet_libraries()
    from parco import job
    from parco.report import tables

    with terminal.progress() as progress:
        columns = job.evaluate(model, data=data, against=against, progress=progress)
    if as_json:
        terminal.print_json(columns)
        return
    measured, other = columns["model"], columns["against"]
    out = terminal.console()
    if other is None:
        out.print(tables.column_table(measured))
    else:
        out.print(tables.comparison_table(other, measured, names=("against", "model")))
