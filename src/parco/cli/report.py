"""`parco report`: the page and the tables of a folder once more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from parco.cli import fit, terminal, train


def report(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="What parco train or parco fit made, or a training that still goes on."),
    ],
    as_json: terminal.Json = False,
    debug: terminal.Debug = False,
) -> None:
    """Make report.html of DIR again from what lies there, and print what was printed at the end of the run.

    A training that goes on is shown as it was at its last checkpoint.
    """
    terminal.quiet_libraries()
    from parco.report import page
    from parco.trainer import pages

    if pages.is_training(folder):
        remade = pages.remake(folder)
        if as_json:
            terminal.print_json(remade)
        else:
            train.show_remade(remade, folder)
        return
    result = page.remake(folder)
    if as_json:
        terminal.print_json(result)
    else:
        fit.show(result)
