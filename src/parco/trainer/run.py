"""One training run whole: a model, a text and a recipe in; checkpoints, the model, result.json and a page out."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_utils import get_last_checkpoint

from parco import hub, machine
from parco.fitting.stages import Progress, tell, write_json, write_whole
from parco.hub.save import flush, put_in_place
from parco.nn import fuse_
from parco.report import curves
from parco.trainer import disk, folder, memory
from parco.trainer.gaps import gaps
from parco.trainer.meter import Meter, flops_per_token
from parco.trainer.result import RunResult, begun, finished
from parco.trainer.settings import Schedule, arguments, check_libraries
from parco.trainer.tensorboard import TensorBoard
from parco.trainer.tensorboard import check as check_tensorboard
from parco.trainer.trainer import Trainer
from parco.trainer.watching import Watching
from parco.trainer.windows import Split, collate, files_of, split
from parco.training import fuse_loss_, prepare_

WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Dtypes that the trained weights may have; bf16 ones are rounded stochastically."""
GLANCE = 64
"""Held-out windows that are looked at while a run goes on; at its end it is all of them."""


@dataclass(frozen=True)
class Settings(Schedule):
    """What decides every number of a run. `model` None is the small model that comes with parco, with new weights;
    `watch_every` 0 watches nothing.
    """

    model: str | None
    data: tuple[str, ...]
    steps: int
    weights: str = "fp32"
    watch_every: int = 50
    fallback: bool = False

    def __post_init__(self) -> None:
        self.check(self.steps)
        if self.watch_every < 0 or (self.fallback and not self.watch_every):
            raise ValueError(f"--watch-every {self.watch_every}: 0 watches nothing, and --fallback needs watching")
        if self.weights not in WEIGHTS:
            raise ValueError(f"--weights {self.weights} is none of {', '.join(WEIGHTS)}")


def run(
    settings: Settings,
    out: Path,
    progress: Progress,
    *,
    resume: bool = False,
    shard: bool = False,
    tensorboard: bool = False,
) -> RunResult:
    """Train, and write checkpoint-N, model, report.html and result.json in `out`, each of them whole or absent.

    A run that is done is not run again with `resume`, one that was interrupted goes on from its last checkpoint, to the
    same bits. With `tensorboard` its log and readings go to event files in `out`/tensorboard as well. Raises ValueError
    where `out` holds another run, a setting does not fit or a library is missing, FloatingPointError for numbers that
    are not finite, and OSError for a full disk.
    """
    check_libraries()
    if tensorboard:
        check_tensorboard()
    machine.peaks()  # before the clock runs
    folder.check(settings.to_json(), settings.defaults(), out, resume)
    if resume and (out / "result.json").exists():
        progress.note(f"{out}: done before")
        return json.loads((out / "result.json").read_text())
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.batch % (ranks * settings.accumulate):
        raise ValueError(f"--batch {settings.batch} is not the same for each of {ranks} ranks: give a multiple")
    check_files(settings.data, settings.held)
    transformers.set_seed(settings.seed)
    memory.before()
    model, tokenizer = _model(settings, progress)
    texts = split(settings.data, settings.held, tokenizer, settings.seq, progress)
    check_windows(texts, settings)
    made_of = {"text": texts.digest, "model": folder.digest_of(model.config)}
    prepared = prepare_(model, settings.recipe)
    layers = f"{prepared}\n{fuse(model)}"
    first = int(os.environ.get("RANK", "0")) == 0
    trainer = Trainer(
        model,
        arguments(settings, settings.steps, 2e-5 if _has_weights(settings.model) else 1e-3, out, ranks),
        precision=settings.precision,
        shard=shard,
        states=settings.states,
        watching=_watching(settings, model, out, progress, first),
        train_dataset=texts.train,
        eval_dataset=texts.held.select(range(min(GLANCE, len(texts.held)))),
        data_collator=collate,
        processing_class=tokenizer,
    )
    meter = Meter(trainer, settings.batch * settings.seq, flops_per_token(model, settings.seq), progress)
    trainer.pop_callback(transformers.PrinterCallback)
    trainer.add_callback(meter)
    board = TensorBoard(out, meter) if tensorboard else None
    if board is not None:
        trainer.add_callback(board)
        if trainer.watching is not None:
            trainer.watching.told = board.told
    trainer.meet()  # before a rank writes where another looks whether there is a run
    known = begun(settings.to_json(), trainer, texts, layers)
    taken = folder.taken(out, settings.to_json(), settings.defaults(), made_of, known, ranks, resume, progress)
    with taken if first else contextlib.nullcontext():
        progress.note(f"{layers}\n{trainer.describe()}")
        memory.forget_peak()
        train(trainer, f"train {settings.recipe}", out, progress)
        peak = memory.peak()
        progress.stage("held out", math.ceil(len(texts.held) / trainer.args.eval_batch_size / ranks))
        meter.judging = True
        loss = trainer.evaluate(texts.held)["eval_loss"]
        result = finished(known, settings.to_json(), trainer, loss, peak, meter)
        if board is not None:
            board.close()
        with disk.explained(out):
            partial = out / ".model.partial"
            trainer.save_model(str(partial))
            if first:
                flush(partial)
                put_in_place(partial, out / "model")
                write_whole(out / "report.html", functools.partial(curves.write, [result], gaps([result])))
                write_json(out / "result.json", result)
    return result


def train(trainer: Trainer, stage: str, out: Path, progress: Progress) -> None:
    """All steps, or those after the last checkpoint, as the stage of that name."""
    checkpoint = get_last_checkpoint(str(out)) if out.exists() else None
    progress.stage(stage, trainer.args.max_steps, int(checkpoint.rpartition("-")[2]) if checkpoint else 0)
    if checkpoint is not None:
        progress.note(f"from {checkpoint}")
        with disk.read(Path(checkpoint) / "trainer_state.json") as file:
            json.loads(file.read_text())
    trainer.train(resume_from_checkpoint=checkpoint)


def fuse(model: Any) -> str:
    """Puts one operation where the model has many, in place, and says what was fused."""
    fused: dict[str, int] = {kind: len(names) for kind, names in fuse_(model).fused.items()}
    try:
        fuse_loss_(model, evaluation=True)
        fused["loss"] = 1
    except ValueError as reason:
        return f"fused: {_counted(fused)}; {reason}"
    return f"fused: {_counted(fused)}"


def _counted(fused: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in fused.items()) or "nothing"


def _watching(settings: Settings, model: Any, out: Path, progress: Progress, first: bool) -> Watching | None:
    if not settings.watch_every:
        return None
    file = out / "watch.jsonl" if first else None
    return Watching(model, settings.watch_every, fallback=settings.fallback, progress=progress, file=file)


def _has_weights(model: str | None) -> bool:
    """Whether `model` is a folder with weights, or the name of a model on the hub."""
    if model is None or Path(model).is_file():
        return False
    return not Path(model).exists() or any(any(Path(model).glob(kind)) for kind in ("*.safetensors", "*.bin"))


def _model(settings: Settings, progress: Progress) -> tuple[Any, Any]:
    """The model and its tokenizer. Raises ValueError where they do not fit each other or the window."""
    given, dtype = settings.model, WEIGHTS[settings.weights]
    if given is not None and _has_weights(given):
        loaded = hub.load(given, dtype=dtype, low_memory=False)
        tell(progress, loaded.notes)
        model, tokenizer, beside = loaded.model, loaded.tokenizer, given
        _refuse_stored(model.config, given)
    else:
        place = hub.embedded_path() if given is None else Path(given)
        if not (place if place.is_file() else place / "config.json").exists():
            raise FileNotFoundError(f"--model {place} has no config.json: give a model's folder or a config.json")
        config = transformers.AutoConfig.from_pretrained(place if place.is_file() else place / "config.json")
        _refuse_stored(config, place)
        try:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype)
        except ValueError as error:
            raise ValueError(f"--model {place}: no language model has this configuration ({error})") from error
        tokenizer = None
        beside = str(place.parent if place.is_file() else place)
    if tokenizer is None or settings.tokenizer is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(settings.tokenizer or beside, local_files_only=True)
    check_model(model, tokenizer, settings.seq, f"--model {given}")
    return model, tokenizer


def check_files(data: Sequence[str], held: str | None) -> None:
    """Raises FileNotFoundError or ValueError for data that is not there or empty, before a model is loaded."""
    files_of(data)
    if held is not None:
        files_of([held])


def check_windows(texts: Split, settings: Schedule) -> None:
    """Raises ValueError where there are fewer windows to train on than a pass takes."""
    least = settings.batch // settings.accumulate
    if len(texts.train) < least:
        raise ValueError(
            f"--data gives {len(texts.train)} windows to train on, and a pass takes {least}: give more text, or a "
            "smaller --batch or --seq"
        )


def check_model(model: Any, tokenizer: Any, length: int, named: str) -> None:
    """Raises ValueError where a model and its tokenizer do not fit each other or windows of `length` tokens, and for a
    model that is no language model.
    """
    config: Any = model.config
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}: take its own")
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if most is not None and length > most:
        raise ValueError(f"--seq {length}: this model knows {most} positions")
    if not _is_causal(model):
        raise ValueError(f"{named} sees the tokens that it is to predict: give a language model, no encoder")


def _refuse_stored(config: Any, place: object) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"--model {place} has stored weights, which do not train: give the model it was made from")


def _is_causal(model: Any) -> bool:
    """Whether what a model says of a token does not depend on those after it."""
    tokens = torch.arange(8)[None] % model.config.get_text_config().vocab_size
    embedded = model.eval().get_input_embeddings()(tokens).detach().requires_grad_()
    said = model(inputs_embeds=embedded).logits[0, 0].float().square().sum()
    return not torch.autograd.grad(said, embedded)[0][0, 1:].any()
