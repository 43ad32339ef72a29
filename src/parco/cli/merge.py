"""`parco merge`: make an adapter part of its model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from parco.cli import terminal


def merge(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model that the adapter was trained on.")],
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="A PEFT folder: of parco tune, PEFT or parco.adapters.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", show_default=False, help="Where the merged model goes.")],
    requantize: Annotated[
        bool,
        typer.Option("--requantize", help="Store the sums anew where MODEL's weights are stored, and say the loss."),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="TEXT",
            show_default=False,
            help="With --requantize: the text that judges. Without it: the held-out text that comes with parco.",
        ),
    ] = None,
    as_json: terminal.Json = False,
    debug: terminal.Debug = False,
) -> None:
    """Add ADAPTER to the matrices of MODEL and save a folder that Transformers loads.

    Of a dense model the sums are exact up to their dtype. Stored weights are refused without --requantize.
    """
    terminal.quiet_libraries()
    from transformers.utils.logging import disable_progress_bar

    from parco.fitting import texts
    from parco.report import tables, units
    from parco.trainer import merge as merge_

    disable_progress_bar()
    text = None if data is None else texts.read(data)
    with terminal.progress() as progress:
        done = merge_(model, adapter, out, progress, requantize=requantize, text=text)
    if as_json:
        terminal.print_json(done)
        return
    rows = [("model", done["folder"])]
    if done["before"] is not None and done["after"] is not None:
        rise = units.rise(done["after"] - done["before"])
        losses = f"{units.nats(done['before'])} → {units.nats(done['after'])} nats per token, {done['windows']} windows"
        rows += [("held-out loss", losses), ("what storing anew costs", rise)]
    terminal.console().print(tables.pairs_table(rows))
