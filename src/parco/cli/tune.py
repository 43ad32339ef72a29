"""`parco tune`: adapt a language model to texts or chats, in few parameters or in all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from parco.cli import schedule, terminal
from parco.cli.train import show

if TYPE_CHECKING:
    from parco.training.optimizer import States


def tune(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A Transformers checkpoint, or a folder fitted by parco.")
    ],
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            metavar="FILE",
            show_default=False,
            help="Texts, or .jsonl files whose lines have messages, prompt and completion, or text; a folder of them; "
            "may be given several times.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", show_default=False, help="Where checkpoints, adapter and page go.")
    ],
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="lora, rslora, dora, pissa, loftq, eva, vera, adapter, parallel, full; or a method written out, such "
            "as lora(16, alpha=32).",
        ),
    ] = "lora",
    rank: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            show_default=False,
            help="Of the factors, or an adapter's width. Default: 16; vera 256, adapters 64.",
        ),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(metavar="NUMBER", show_default=False, help="Scale of factors. Default: the rank.")
    ] = None,
    dropout: Annotated[float, typer.Option(metavar="SHARE", help="Of what an adapter reads.")] = 0.0,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            show_default=False,
            help="Layers that get an adapter, by the end of their names; may be given several times, or once as "
            "all-linear. Without it: the linear layers of all blocks.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            show_default=False,
            help="Store the frozen matrices so: int4:32, nf4:64, mxfp4, … Without it: as they are.",
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option(metavar="NAME", help="How matrices multiply that --base does not store: bf16, int8, mxfp8, …")
    ] = "bf16",
    template: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|plain",
            show_default=False,
            help="The chat template (Jinja). Without it: the tokenizer's own.",
        ),
    ] = None,
    packing: Annotated[
        bool, typer.Option("--packing/--no-packing", help="Several examples in a window, apart from one another.")
    ] = True,
    heldout: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="What judges and is not trained on. Without it: 5% of --data's windows, at most 64.",
        ),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(metavar="N", show_default=False, help="Times through the data. Default: 3.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", show_default=False, help="Optimizer steps, instead of --epochs.")
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Windows per step.")] = 8,
    accumulate: schedule.Accumulate = 1,
    seq: schedule.Seq = 512,
    lr: Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            show_default=False,
            help="Greatest learning rate. Default: 2e-4 for lora and dora, 4e-3 for vera, 1e-3 for adapters, 2e-5 for "
            "full.",
        ),
    ] = None,
    warmup: schedule.Warmup = None,
    weight_decay: schedule.WeightDecay = 0.0,
    states: schedule.States = "fp32",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute blocks twice instead of keeping what is inside them.")
    ] = False,
    tokenizer: schedule.Tokenizer = None,
    eval_every: Annotated[
        int | None,
        typer.Option(metavar="N", show_default=False, help="Steps between looks at what is held out. Default: 10%."),
    ] = None,
    save_every: schedule.SaveEvery = None,
    seed: schedule.Seed = 0,
    resume: schedule.Resume = False,
    as_json: terminal.Json = False,
    debug: terminal.Debug = False,
) -> None:
    """Adapt MODEL to --data by an adapter over its frozen matrices, or in full.

    Writes --out/adapter, a PEFT folder of the state with the least held-out loss (--out/model for full), checkpoints
    and report.html. `parco merge` makes adapter and model one.
    """
    terminal.quiet_libraries()
    from transformers.utils.logging import disable_progress_bar

    from parco.report import curves
    from parco.trainer import TuneSettings, method_of
    from parco.trainer import tune as tune_

    disable_progress_bar()
    settings = TuneSettings(
        model=model,
        data=tuple(map(str, data)),
        method=method_of(method, rank, alpha, dropout),
        targets=None if target is None else tuple(target),
        base=base,
        recipe=recipe,
        template=template,
        packing=packing,
        held=None if heldout is None else str(heldout),
        epochs=epochs,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        seq=seq,
        lr=lr,
        warmup=warmup,
        weight_decay=weight_decay,
        states=cast("States", states),
        checkpointing=checkpointing,
        tokenizer=tokenizer,
        eval_every=eval_every,
        save_every=save_every,
        seed=seed,
    )
    with terminal.progress() as progress:
        done = tune_(settings, out, progress, resume=resume)
    if as_json:
        terminal.print_json(done)
        return
    show(curves.tune_table(done), out, Path(done["adapter"]))
