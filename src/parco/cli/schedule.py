"""The options that `parco train` and `parco tune` share to the word."""

from __future__ import annotations

from typing import Annotated

import typer

Accumulate = Annotated[int, typer.Option(metavar="N", help="Passes in which a step's windows go.")]
Seq = Annotated[int, typer.Option(metavar="N", help="Tokens per window.")]
Warmup = Annotated[
    int | None,
    typer.Option(metavar="N", show_default=False, help="Steps in which the rate rises. Default: 2% of them."),
]
WeightDecay = Annotated[float, typer.Option(metavar="RATE", help="Of matrices, not of norms and biases.")]
States = Annotated[str, typer.Option(metavar="fp32|8bit", help="What AdamW's moments are kept in.")]
Tokenizer = Annotated[
    str | None, typer.Option(metavar="DIR", show_default=False, help="Default: the one beside the model.")
]
SaveEvery = Annotated[
    int | None, typer.Option(metavar="N", show_default=False, help="Steps between checkpoints. Default: 10%.")
]
Seed = Annotated[int, typer.Option(metavar="N", help="Of every random draw.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")]
