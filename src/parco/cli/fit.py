"""`parco fit`: make a model smaller and faster, save it, and show what it cost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from parco.cli import terminal

if TYPE_CHECKING:
    from parco.fitting.result import Result

BETWEEN_METHODS = re.compile(r"[,\s]+(?![^(]*\))")


def fit(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            help="A folder with a Transformers checkpoint, or a name on the Hugging Face hub. "
            "Without it: the small model that comes with parco.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="TEXT",
            show_default=False,
            help="A text file like what the model will read: it is calibrated on one part and judged on another. "
            "Without it: the text that comes with parco, and text that the model writes.",
        ),
    ] = None,
    size: Annotated[
        float | None,
        typer.Option(
            metavar="FRACTION",
            show_default=False,
            help="Largest size, as a fraction of the bf16 checkpoint's bytes: 0.35.",
        ),
    ] = None,
    speed: Annotated[
        float | None,
        typer.Option(
            metavar="TIMES", show_default=False, help="Least decode speed, as a multiple of the original's: 1.5."
        ),
    ] = None,
    loss: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            show_default=False,
            help="Largest rise in loss, in nats per token. Used with 0.02 when neither --size nor --speed is given.",
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHODS",
            show_default=False,
            help="What may be chosen, separated by commas: int8:row,int4:64,factor(0.5)>>int8:row. "
            "'keep' is always allowed. Default: integers, ternary, zeros, factors, a correction.",
        ),
    ] = None,
    heal: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS",
            show_default=False,
            help="Training steps after the change that bring the outputs back to the original's; 0 for none. "
            "Default: as many as suit the model's size.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            show_default=False,
            help="Where the model and report.html go. Default: a folder here, named after the model and the target.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of every random draw.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over; do not go on from an interrupted run.")] = False,
    as_json: terminal.Json = False,
    debug: terminal.Debug = False,
) -> None:
    """Make MODEL smaller and faster on this machine, within a budget, and show what it cost.

    Give one of --size, --speed and --loss; the others are improved as far as that allows. An interrupted run goes on
    where it stopped when the same command is given again.
    """
    terminal.quiet_libraries()
    from parco import job

    with terminal.progress() as progress:
        result = job.fit(
            model,
            data=data,
            size=size,
            speed=speed,
            loss=loss,
            methods=split_methods(methods),
            heal=heal,
            out=out,
            seed=seed,
            fresh=fresh,
            progress=progress,
        )
    if as_json:
        terminal.print_json(result)
    else:
        show(result)


def split_methods(methods: list[str] | None) -> list[str] | None:
    """`--methods a,b --methods "c d"` as one list; commas inside parentheses belong to the method."""
    if methods is None:
        return None
    return [method for text in methods for method in BETWEEN_METHODS.split(text) if method]


def show(result: Result) -> None:
    """Prints what a fit found, and where it lies."""
    from parco.report import comparison, tables

    out = terminal.console()
    out.print()
    out.print(tables.comparison_table(result["original"], result["fitted"], result["prefill_tokens"]))
    out.print()
    out.print(comparison.lead(result))
    for warning in result["warnings"]:
        out.print(f"Note: {warning}")
    folder = result["folder"]
    if folder is None:
        return
    out.print()
    places = [
        ("model", folder),
        ("page", str(Path(folder) / "report.html")),
        ("load it", f'import parco; model = AutoModelForCausalLM.from_pretrained("{folder}")'),
    ]
    out.print(tables.pairs_table(places))
