"""`parco eval`: loss and speed of a model, alone or against another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from parco.cli import terminal


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="A fitted folder, any Transformers checkpoint, or a GGUF file.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="TEXT",
            show_default=False,
            help="A text file; all of it is used. Without it: the held-out text that comes with parco.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            show_default=False,
            help="Another model with the same tokenizer, usually the original: KL and agreement are measured "
            "against it, and speeds in turn with it.",
        ),
    ] = None,
    as_json: terminal.Json = False,
    debug: terminal.Debug = False,
) -> None:
    """Measure the loss, perplexity, speed and memory of the model in DIR on a text.

    The loss is what a plain Transformers loop gives over the same windows of the text, in nats per token.
    """
    terminal.quiet_libraries()
    from parco import hub
    from parco.fitting import texts
    from parco.fitting.judge import judge
    from parco.report import tables

    text = hub.embedded_texts().heldout if data is None else texts.read(data)
    if against is not None:
        hub.locate(against)
    loaded = hub.load(model)
    terminal.show_notes(loaded.notes)
    other = None if against is None else hub.load(against)
    if other is not None:
        terminal.show_notes(tuple(f"{against}: {note}" for note in other.notes))
    named = "the text that comes with parco" if data is None else f"--data {data}"
    with terminal.progress() as progress:
        measured, beside = judge(loaded, text, named, progress, other)
    if as_json:
        terminal.print_json({"model": measured, "against": beside})
    elif beside is None:
        terminal.console().print(tables.column_table(measured))
    else:
        terminal.console().print(tables.comparison_table(beside, measured, names=("against", "model")))
