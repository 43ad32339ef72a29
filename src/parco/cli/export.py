"""`parco export`: files of one library as those of another."""

from __future__ import annotations

from typing import Annotated

import typer

from parco.cli import terminal


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder (dense, of parco, compressed-tensors, GPTQ or AWQ), a GGUF file, or a name on the Hugging "
            "Face hub.",
        ),
    ],
    out: Annotated[
        str,
        typer.Option("--out", metavar="PATH", show_default=False, help="The new folder, or with --to gguf the file."),
    ],
    to: Annotated[str, typer.Option("--to", metavar="WHAT", help="parco, compressed-tensors or gguf.")] = "parco",
    type: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            show_default=False,
            help="With --to gguf: round all matrices to F32, F16, BF16, Q8_0, Q4_0, Q4_1, TQ2_0, TQ1_0 or MXFP4. "
            "Without it each keeps its numbers.",
        ),
    ] = None,
    ends: Annotated[
        str | None,
        typer.Option(metavar="TYPE", show_default=False, help="With --to gguf: another type for embedding and head."),
    ] = None,
    round_scales: Annotated[
        bool, typer.Option("--round-scales", help="With --to gguf: scales may be rounded to fp16, which GGML's are.")
    ] = False,
    dense: Annotated[
        bool,
        typer.Option("--dense", help="With --to compressed-tensors: what it has no format for is written dense."),
    ] = False,
    as_json: terminal.Json = False,
    debug: terminal.Debug = False,
) -> None:
    """Write MODEL for another program. Codes and scales stay as they are, or the matrix that has no place is named."""
    terminal.quiet_libraries()
    from parco import hub
    from parco.report import tables, units

    done = hub.export(model, out, to, type=type, ends=ends, round_scales=round_scales, dense=dense)
    if as_json:
        terminal.print_json(done)
        return
    stored = ", ".join(f"{count} × {text}" for text, count in done["stored"].items()) or "none: it is dense"
    rows = [("written", done["out"]), ("size", units.size(done["nbytes"])), ("matrices in few bits", stored)]
    terminal.console().print(tables.pairs_table([*rows, *(("note", note) for note in done["notes"])]))
