"""`parco train`: train a language model by a recipe, or by several and see what each costs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from parco.cli import schedule, terminal

if TYPE_CHECKING:
    from rich.table import Table

    from parco.trainer import Failure, TuneResult
    from parco.trainer.pages import Remade
    from parco.training.optimizer import States

_EMBEDDED = "Without it: the small model that comes with parco, with new weights."


def train(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", show_default=False, help="Where checkpoints, model and page go.")
    ],
    steps: Annotated[int, typer.Option("--steps", metavar="N", show_default=False, help="Optimizer steps.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="CONFIG|DIR",
            show_default=False,
            help=f"A Transformers checkpoint whose weights are trained on, or a config.json: new weights. {_EMBEDDED}",
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="TEXT",
            show_default=False,
            help="A text file, or a folder of them; may be given several times. Without it: the text that comes with "
            "parco.",
        ),
    ] = None,
    heldout: Annotated[
        Path | None,
        typer.Option(
            metavar="TEXT",
            show_default=False,
            help="A text that judges and is not trained on. Without it: the last 5% of --data.",
        ),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="bf16, fp16, fp8-current, mxfp8, nvfp4, int8, … or operands written out: see the guide on training.",
        ),
    ] = "bf16",
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            show_default=False,
            help="Train by each of these recipes, separated by commas, on the same data in the same order, and show "
            "each one's loss, speed and memory beside the first.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(metavar="N", help="With --compare: seeds that each recipe runs with.")] = 1,
    batch: Annotated[int, typer.Option(metavar="N", help="Windows per step, over all ranks.")] = 8,
    accumulate: schedule.Accumulate = 1,
    seq: schedule.Seq = 512,
    lr: Annotated[
        float | None,
        typer.Option(
            metavar="RATE", show_default=False, help="Greatest learning rate. Default: 1e-3 for new weights, else 2e-5."
        ),
    ] = None,
    warmup: schedule.Warmup = None,
    weight_decay: schedule.WeightDecay = 0.1,
    weights: Annotated[
        str, typer.Option(metavar="fp32|bf16", help="What weights are kept in; bf16 ones are rounded stochastically.")
    ] = "fp32",
    states: schedule.States = "fp32",
    tokenizer: schedule.Tokenizer = None,
    watch_every: Annotated[
        int,
        typer.Option(metavar="N", help="Steps between looks at what each layer's formats lose; 0 for none."),
    ] = 50,
    fallback: Annotated[
        bool, typer.Option("--fallback", help="Move products that lose too much to a higher precision, saying so.")
    ] = False,
    eval_every: Annotated[
        int | None,
        typer.Option(metavar="N", show_default=False, help="Steps between looks at the held-out text. Default: 10%."),
    ] = None,
    save_every: schedule.SaveEvery = None,
    seed: schedule.Seed = 0,
    shard: Annotated[bool, typer.Option("--shard", help="Under torchrun: FSDP2 instead of DDP.")] = False,
    tensorboard: Annotated[
        bool,
        typer.Option("--tensorboard", help="Log and readings to --out/tensorboard too, in TensorBoard's files."),
    ] = False,
    resume: schedule.Resume = False,
    as_json: terminal.Json = False,
    debug: terminal.Debug = False,
) -> None:
    """Train a language model by a recipe of low precision, with Transformers' Trainer.

    Writes --out/model, checkpoints and report.html. `torchrun --nproc-per-node N -m parco.cli train …` trains with DDP,
    or FSDP2 with --shard.
    """
    terminal.quiet_libraries()
    from transformers.utils.logging import disable_progress_bar

    from parco import hub
    from parco.fitting.stages import Silent
    from parco.report import curves
    from parco.trainer import Settings, run
    from parco.trainer import compare as compare_

    disable_progress_bar()
    shipped = hub.embedded_path()
    settings = Settings(
        model=model,
        data=tuple(map(str, data or [shipped / "calibration.txt"])),
        held=str(heldout) if heldout is not None else None if data else str(shipped / "heldout.txt"),
        steps=steps,
        recipe=recipe,
        tokenizer=tokenizer,
        batch=batch,
        accumulate=accumulate,
        seq=seq,
        lr=lr,
        warmup=warmup,
        weight_decay=weight_decay,
        weights=weights,
        states=cast("States", states),
        seed=seed,
        watch_every=watch_every,
        fallback=fallback,
        eval_every=eval_every,
        save_every=save_every,
    )
    failed: list[Failure] = []
    first = os.environ.get("RANK", "0") == "0"
    with terminal.progress() as shown:
        progress = shown if first else Silent()
        if compare is None:
            done = run(settings, out, progress, resume=resume, shard=shard, tensorboard=tensorboard)
            table = curves.run_table(done)
        else:
            names = [name.strip() for name in compare.split(",") if name.strip()]
            done = compare_(
                settings, names, out, progress, seeds=seeds, resume=resume, shard=shard, tensorboard=tensorboard
            )
            table, failed = curves.gap_table(done["gaps"]), done["failed"]
    if not first:
        return
    if as_json:
        terminal.print_json(done)
    else:
        show(table, out, out / "model" if compare is None else None)
    if failed:
        said = "; ".join(f"{each['recipe']}, seed {each['seed']}, stopped at {each['said']}" for each in failed)
        raise FloatingPointError(f"{len(failed)} of the runs failed, the others are above: {said}")


def show(table: Table, out: Path, made: Path | None) -> None:
    """Prints the table of a training, and where its page lies and the folder that it `made`."""
    from parco.report import tables

    console = terminal.console()
    console.print()
    console.print(table)
    console.print()
    places = [("page", str(out / "report.html")), *([(made.name, str(made))] if made is not None else [])]
    console.print(tables.pairs_table(places))


def show_remade(remade: Remade, out: Path) -> None:
    """Prints what a training folder holds: the tables of its end, or how far it is."""
    from parco.report import curves
    from parco.trainer import folder

    going, made = remade["so_far"], [out / name for name in ("model", "adapter") if (out / name).exists()]
    if going is not None:
        table = curves.going_table(going)
    elif not folder.has_run(out):
        table = curves.gap_table(remade["gaps"])
    else:
        run = remade["runs"][0]
        table = curves.tune_table(cast("TuneResult", run)) if "method" in run else curves.run_table(run)
    show(table, out, made[0] if made else None)
    if going is None:
        for one in remade["going"]:
            print(f"{one['recipe']}, seed {one['seed']}: at step {one['step']} of {one['steps']}")
