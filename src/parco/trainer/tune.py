"""One tuning whole: a model, examples and a method in; checkpoints, an adapter, result.json and a page out."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
import transformers

from parco import adapters, hub, machine
from parco.adapters import Bottleneck, DoRA, LoRA, VeRA
from parco.adapters.methods import KNOWN
from parco.adapters.targets import ALL_LINEAR
from parco.fitting.convert import convert_
from parco.fitting.stages import Progress, tell, write_json, write_whole
from parco.nn import linears
from parco.nn.linear import Linear
from parco.nn.saved import numbers
from parco.report import curves
from parco.trainer import cached, disk, examples, folder, memory, packing
from parco.trainer.gaps import gaps
from parco.trainer.meter import Meter, flops_per_token
from parco.trainer.result import RunResult, begun, finished
from parco.trainer.run import check_files, check_model, check_windows, fuse, train
from parco.trainer.settings import Schedule, arguments, check_libraries
from parco.trainer.tuner import Best, Released, Tuner
from parco.trainer.windows import Split, collate, split
from parco.training import Recipe, prepare_

FULL = "full"
RATES: dict[type[adapters.Method], float] = {LoRA: 2e-4, DoRA: 2e-4, VeRA: 4e-3, Bottleneck: 1e-3}
"""Greatest learning rate where none is given."""
FULL_RATE = 2e-5
EPOCHS = 3.0
MOST_HELD = 64
"""Of data without a text to judge by: windows held out at most. Every look is at all of them."""
SEEN = 8
"""Passes of training windows from which `init=eva` learns what layers read."""


_SHORT = {
    "rslora": ("lora", {"scaling": "rslora"}),
    "pissa": ("lora", {"init": "pissa"}),
    "loftq": ("lora", {"init": "loftq"}),
    "eva": ("lora", {"init": "eva"}),
    "adapter": ("bottleneck", {"placement": "serial"}),
    "parallel": ("bottleneck", {"placement": "parallel"}),
}
"""Names that people know for variants of a method."""


def method_of(name: str, rank: int | None = None, alpha: float | None = None, dropout: float = 0.0) -> str:
    """The text of the method that `name` is short for ("pissa", "adapter"), with this rank (of a bottleneck the width),
    alpha and dropout. A method that is written out, "lora(16, alpha=32)", is told nothing besides. Raises ValueError
    for an unknown name, and for a number that the method has not or has been told.
    """
    numbers = {"rank": rank, "alpha": alpha, "dropout": dropout or None}
    given = {key: value for key, value in numbers.items() if value is not None}
    if name == FULL or "(" in name:
        if given:
            raise ValueError(f"--{next(iter(given))} is not for --method {name}: leave it out, or write it in there")
        return name if name == FULL else str(adapters.parse(name))
    kind, told = _SHORT.get(name, (name, {}))
    if kind not in KNOWN:
        names = ", ".join([*KNOWN, *_SHORT, FULL])
        raise ValueError(f"--method {name} is none of {names}, nor written out as lora(16) is")
    fields = {field.name for field in dataclasses.fields(KNOWN[kind])}
    if "width" in fields and rank is not None:
        given["width"] = given.pop("rank")
    values: dict[str, Any] = told | given
    for key in values.keys() - fields:
        raise ValueError(f"--{key} is not for --method {name}: it has {', '.join(sorted(fields))}")
    return str(KNOWN[kind](**values))


@dataclass(frozen=True)
class TuneSettings(Schedule):
    """What decides every number of a tuning. `method` is the text of an adapter's method, or "full", which trains all
    of the model; `targets` are names of layers, or "all-linear" alone; `base` is a format or method that the frozen
    matrices are stored by; `template` "plain" or a file with a chat template. Of `steps` and `epochs` one is given, or
    neither: 3 epochs.
    """

    model: str
    data: tuple[str, ...]
    method: str = "lora(16)"
    targets: tuple[str, ...] | None = None
    base: str | None = None
    steps: int | None = None
    epochs: float | None = None
    template: str | None = None
    packing: bool = True
    checkpointing: bool = False
    weight_decay: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        self.check(self.steps)
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ValueError(f"--epochs {self.epochs:g} makes no sense: it must be a positive number")
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"--epochs {self.epochs:g} and --steps {self.steps}: give one of them")
        if self.method != FULL:
            adapters.parse(self.method)
        elif self.base is not None or self.targets is not None:
            raise ValueError("--method full trains all of the model: leave --base and --targets out")

    @property
    def rate(self) -> float:
        """The greatest learning rate where none is given."""
        return FULL_RATE if self.method == FULL else RATES[type(adapters.parse(self.method))]

    def steps_of(self, windows: int) -> int:
        """Optimizer steps where there are so many windows to train on."""
        return self.steps or max(1, math.ceil((self.epochs or EPOCHS) * windows / self.batch))


class TuneResult(RunResult):
    """What a tuning found, as result.json holds it: as of a run, and `before`, the held-out loss before the first step;
    `loss` is the least that was found, at `best_step`, and what is saved has it. `tokens` and speed leave out padding,
    which `filled` is the rest of. Of lines of JSON `examples` counts those trained on or held out, `cut` those of them
    that a window was too short for, `left_out` those without an answer. `adapter` is the folder that was written.
    """

    method: str
    base: str | None
    trained: int
    before: float
    best_step: int
    examples: int
    cut: int
    left_out: int
    filled: float
    adapter: str


def tune(settings: TuneSettings, out: Path, progress: Progress, *, resume: bool = False) -> TuneResult:
    """Train an adapter, or with method "full" the model, and write checkpoint-N, `adapter` (or `model`), report.html
    and result.json in `out`, each of them whole or absent. `adapter` is a PEFT folder with the tokenizer beside it;
    where a `base` is given, the folder `base` holds the matrices stored so, as `hub.save` writes them.

    A tuning that is done is not run again with `resume`, one that was interrupted goes on from its last checkpoint, to
    the same bits. Raises ValueError where `out` holds another run, a setting does not fit or the data is broken,
    FloatingPointError for numbers that are not finite, and OSError for a full disk.
    """
    check_libraries()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("parco tune trains in one process: start it without torchrun")
    machine.peaks()  # before the clock runs
    folder.check(settings.to_json(), settings.defaults(), out, resume)
    if resume and (out / "result.json").exists():
        progress.note(f"{out}: done before")
        return json.loads((out / "result.json").read_text())
    check_files(settings.data, settings.held)
    memory.before()
    model, tokenizer, fingerprint = _model(settings, progress)
    caches = getattr(model.config, "use_cache", None)
    texts = _texts(settings, model, tokenizer, progress)
    made_of = {"data": texts.digest, "model": fingerprint}
    size, flops = numbers(model), flops_per_token(model, settings.seq, frozen=settings.method != FULL)
    layers = _prepare_(settings, model, texts)
    steps = settings.steps_of(len(texts.train))
    fresh = not list(out.glob("checkpoint-*"))
    trainer = Tuner(
        model,
        arguments(
            settings,
            steps,
            settings.rate,
            out,
            eval_on_start=fresh,
            gradient_checkpointing=settings.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if settings.checkpointing else None,
        ),
        precision=settings.precision,
        states=settings.states,
        train_dataset=texts.train,
        eval_dataset=texts.held,
        data_collator=collate,
        processing_class=tokenizer,
    )
    meter = Meter(trainer, settings.batch * settings.seq, flops, progress)
    trainer.pop_callback(transformers.PrinterCallback)
    trainer.add_callback(meter)
    known = begun(settings.to_json(), trainer, texts, layers)
    with folder.taken(out, settings.to_json(), settings.defaults(), made_of, known, 1, resume, progress):
        progress.note(f"{layers}\n{trainer.describe()}")
        best = Best(model, out / "best.safetensors", progress)
        trainer.add_callback(best)
        trainer.add_callback(Released())
        memory.forget_peak()
        train(trainer, f"tune by {settings.method}", out, progress)
        peak = memory.peak()
        best.put_back_()
        run = finished(known, settings.to_json(), trainer, best.loss, peak, meter)
        found = _result(settings, trainer, texts, run, best, size, out)
        if caches is not None:
            model.config.use_cache = caches  # which Trainer has turned off
        with disk.explained(out):
            _write(settings, model, tokenizer, Path(found["adapter"]))
            write_whole(out / "report.html", functools.partial(curves.write, [found], gaps([found])))
            write_json(out / "result.json", found)
            best.file.unlink()
    return found


def _model(settings: TuneSettings, progress: Progress) -> tuple[Any, Any, str]:
    """The model as it lies in its folder, in fp32 where all of it trains, its tokenizer with the chat template, and the
    folder's fingerprint: no checkpoint holds the frozen matrices.
    """
    full = settings.method == FULL
    template = None if settings.template is None else examples.template_of(settings.template)
    # What is stored anew is read once; all else is in memory, because initialisations change matrices in place.
    loaded = hub.load(settings.model, dtype=torch.float32 if full else None, low_memory=settings.base is not None)
    tell(progress, loaded.notes)
    model: Any = loaded.model
    stored = getattr(model.config, "quantization_config", None) is not None
    if stored and full:
        raise ValueError(f"{settings.model} has stored weights, which do not train: give another --method")
    if stored and settings.base is not None:
        raise ValueError(f"{settings.model} has stored weights already: leave --base out")
    tokenizer: Any = loaded.tokenizer
    if settings.tokenizer is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(settings.tokenizer, local_files_only=True)
    if template is not None:
        tokenizer.chat_template = template
    check_model(model, tokenizer, settings.seq, settings.model)
    return model, tokenizer, loaded.fingerprint


def _texts(settings: TuneSettings, model: Any, tokenizer: Any, progress: Progress) -> Split:
    """The windows of the data, enough of them."""
    read = packing.reader([*settings.data, *([settings.held] if settings.held else [])], settings.packing)
    if read is not None and settings.packing and not packing.keeps_apart(model):
        raise ValueError(
            f"{settings.model}: in a {type(model).__name__} examples of one window see one another: give --no-packing"
        )
    texts = split(settings.data, settings.held, tokenizer, settings.seq, progress, read, MOST_HELD)
    check_windows(texts, settings)
    counts = cached.counts_of(texts.train)
    if counts:
        progress.note(
            f"{counts['examples']:,} examples, {len(texts.train):,} windows to train on, {len(texts.held):,} held out; "
            f"{counts['cut']:,} cut to {settings.seq} tokens, {counts['left out']:,} left out: no answer before that"
        )
    return texts


def _prepare_(settings: TuneSettings, model: Any, texts: Split) -> str:
    """Stores the base, has it follow the recipe, fuses what is fused and adds the adapter, in place; what was done."""
    done: list[str] = []
    if settings.base is not None:
        done.append(str(convert_(model, settings.base)).rpartition("\n")[2])
    dense = [site for site in linears(model).values() if not isinstance(site.module, Linear)]
    # Under autocast frozen matrices multiply by a recipe of 16 bits as they are.
    if dense and (settings.method == FULL or not Recipe.parse(settings.recipe).is_dense):
        done.append(str(prepare_(model, settings.recipe)))
    added: list[str] = []
    if settings.method != FULL:
        transformers.set_seed(settings.seed)
        method = adapters.parse(settings.method)
        inputs = _inputs(settings, texts) if getattr(method, "init", None) == "eva" else None
        targets = ALL_LINEAR if settings.targets == (ALL_LINEAR,) else settings.targets
        added.append(str(adapters.add_(model, method, targets, inputs=inputs)))
    # After the adapters: of a head that carries one the loss is not fused.
    done += [fuse(model), *added]
    return "\n".join(done)


def _inputs(settings: TuneSettings, texts: Split) -> list[Any]:
    rows = settings.batch // settings.accumulate
    seen = texts.train.select(range(min(SEEN * rows, len(texts.train))))
    return [{"input_ids": row["input_ids"][None].long()} for row in seen]


def _result(
    settings: TuneSettings, trainer: Tuner, texts: Split, run: RunResult, best: Best, size: int, out: Path
) -> TuneResult:
    every: list[dict[str, Any]] = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    counts = cached.counts_of(texts.train)
    filled = 1.0
    if counts:
        made = len(texts.train) + (0 if settings.held else len(texts.held))
        filled = counts["tokens"] / (made * settings.seq)
    trains = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    changed: dict[str, Any] = {
        "settings": run["settings"] | {"steps": trainer.args.max_steps},
        "parameters": size,
        "held_out": [[entry["step"], entry["eval_loss"]] for entry in every],
        "tokens": round(run["tokens"] * filled),
        "tokens_per_second": run["tokens_per_second"] * filled,
        "mfu": run["mfu"] * filled,
        "method": settings.method,
        "base": settings.base,
        "trained": trains,
        "before": every[0]["eval_loss"],
        "best_step": best.step,
        "examples": counts.get("examples", 0),
        "cut": counts.get("cut", 0),
        "left_out": counts.get("left out", 0),
        "filled": filled,
        "adapter": str(out / ("model" if settings.method == FULL else "adapter")),
    }
    return cast("TuneResult", {**run, **changed})


def _write(settings: TuneSettings, model: Any, tokenizer: Any, target: Path) -> None:
    """The adapter as a PEFT folder, or the model, with the tokenizer: whole or absent."""
    if settings.method == FULL:
        hub.save_dense(model, tokenizer, target)
        return
    with TemporaryDirectory() as beside:
        tokenizer.save_pretrained(beside)
        adapters.save(model, target, extra={file.name: file for file in Path(beside).iterdir() if file.is_file()})
    if settings.base is not None:
        adapters.remove_(model, "default")
        hub.save(model, tokenizer, target.with_name("base"))
