"""`parco.fit`, the main job from a folder's name to a saved model and a page, and `parco.convert_`, one method
everywhere.

Everything that they do lies in fitting, hub and report; here these meet.
"""

from __future__ import annotations

import errno
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import torch

import parco
from parco import hub, report
from parco.fitting import candidates, convert, summary, texts
from parco.fitting.convert import Conversion, Filter
from parco.fitting.methods import Method
from parco.fitting.pipeline import Fit, Settings
from parco.fitting.result import Result
from parco.fitting.stages import Progress, Silent, Stages, is_full, write_json
from parco.products import Native, Product

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_LOSS = 0.02
GENERATED = 4
"""Windows that a foreign model without data writes for its own calibration."""


def fit(
    model: str | Path | None = None,
    *,
    data: str | Path | None = None,
    size: float | None = None,
    speed: float | None = None,
    loss: float | None = None,
    methods: Sequence[str] | None = None,
    heal: int | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Make `model` cheaper within one budget, save it to `out` with its page, and return what `out`/result.json holds.

    model: a folder or hub name; None takes the small model that comes with parco. data: a text file of what the model
    will read. Exactly one of `size` (fraction of the bf16 checkpoint's bytes), `speed` (multiple of its decode speed)
    and `loss` (rise in nats per token) is the budget, by default loss=0.02; the others are what is optimised. methods:
    texts such as "int4:64"; "keep" is always allowed. heal: training steps afterwards, None for what suits the model. A
    run that was interrupted goes on where it stopped, unless `fresh`; its stages lie in `out`.work until the job is
    done.

    Raises ValueError or OSError with a text of one line for what cannot be: an unknown method, a text shorter than one
    window, a budget out of reach (naming the best reachable), a full disk, and all that `hub.load` refuses.
    """
    kind, value = budget(size, speed, loss)
    settings = Settings(
        kind=kind,
        value=value,
        methods=None if methods is None else tuple(methods),
        heal=_steps(heal),
        seed=seed,
        version=parco.__version__,
    )
    candidates.parse_methods(settings.methods)
    text = None if data is None else texts.read(Path(data))
    folder = Path(out).expanduser() if out is not None else default_folder(model, kind, value)
    folder = folder if folder.name not in ("", "..") else folder.resolve()
    hub.refuse_foreign(folder, hub.PAGES)
    source = hub.embedded_path() if model is None else model
    command = _command(model, data, kind, value, methods, heal, out, seed)
    told = progress or Silent()
    work = folder.with_name(folder.name + ".work")

    def load() -> hub.Loaded:
        return hub.load(source)

    try:
        with Stages(work, told, fresh) as stages:
            try:
                result = _run(settings, load, text, data, model, stages, folder, command, told)
                stages.remove()
            except BaseException:
                stages.remove_if_empty()
                raise
    except BaseException as error:
        if is_full(error) and not isinstance(error, OSError):
            raise OSError(errno.ENOSPC, f"the disk is full: nothing was saved to {folder}") from error
        raise
    return result


def convert_(
    model: torch.nn.Module,
    method: Method | str,
    filter_fn: Filter | None = None,
    product: Product | str = Native(),  # noqa: B008
) -> Conversion:
    """`fitting.convert.convert_`, and a Transformers model knows afterwards how to save itself.

    Arguments, result and errors are those of `fitting.convert.convert_`. `model.save_pretrained(folder)` then writes a
    folder that `from_pretrained` loads with the same stored bytes.
    """
    done = convert.convert_(model, method, filter_fn, product)
    if callable(getattr(model, "save_pretrained", None)):
        hub.attach(cast("PreTrainedModel", model))
    return done


def _run(
    settings: Settings,
    load: Callable[[], hub.Loaded],
    text: str | None,
    data: str | Path | None,
    model: str | Path | None,
    stages: Stages,
    folder: Path,
    command: str,
    progress: Progress,
) -> Result:
    job = Fit(
        settings, load, _reader(text, data), GENERATED if model is not None and text is None else 0, stages, progress
    )
    outcome = job.run()
    chosen = outcome[0]
    tokenizer: Any = job.original.tokenizer
    plan = chosen.plan.to_json()
    saved = stages.folder / "model"
    hub.save(chosen.model, tokenizer, saved, plan=plan)
    measured = summary.final(job, chosen, saved)
    result = summary.result(job, outcome, measured, "embedded" if model is None else str(model), command, folder)
    progress.stage("save", 1)
    with TemporaryDirectory(dir=stages.folder) as temporary:
        pages = Path(temporary)
        write_json(pages / "result.json", result)
        report.write(result, pages / "report.html")
        extra = {name: pages / name for name in hub.PAGES}
        hub.save(chosen.model, tokenizer, folder, plan=plan, extra=extra)
    progress.advance()
    return result


def budget(size: float | None, speed: float | None, loss: float | None) -> tuple[str, float]:
    """The one budget that was given, ("loss", 0.02) when none was. Raises ValueError for several or for a value without
    sense.
    """
    given = [(name, value) for name, value in (("size", size), ("speed", speed), ("loss", loss)) if value is not None]
    if len(given) > 1:
        raise ValueError(
            f"give one of --size, --speed and --loss, not {' and '.join('--' + name for name, _ in given)}"
        )
    kind, value = given[0] if given else ("loss", DEFAULT_LOSS)
    if not 0 < value < float("inf"):
        raise ValueError(f"--{kind} {value:g} makes no sense: it must be a positive number")
    if kind == "size" and value > 1:
        raise ValueError(
            f"--size {value:g} is more than the bf16 checkpoint: give a fraction of its bytes, such as 0.35"
        )
    return kind, float(value)


def default_folder(model: str | Path | None, kind: str, value: float) -> Path:
    """A folder here, named after the model and the target: "embedded-size0.35"."""
    name = "embedded" if model is None else Path(model).resolve().name if Path(model).exists() else Path(model).name
    return Path(f"{name}-{kind}{value:g}")


def _steps(heal: int | None) -> int | None:
    if heal is not None and heal < 0:
        raise ValueError(f"--heal {heal} is negative: give a number of training steps, 0 for none")
    return heal


def _reader(text: str | None, data: str | Path | None) -> Callable[[Any, int], texts.Windows]:
    """Windows of the person's text, or of the two texts that come with parco."""

    def read(tokenizer: Any, length: int) -> texts.Windows:
        if text is not None:
            return texts.own_text(tokenizer, text, f"--data {data}", length)
        shipped = hub.embedded_texts()
        return texts.two_texts(
            tokenizer, shipped.calibration, shipped.heldout, "the texts that come with parco", length
        )

    return read


def _command(
    model: str | Path | None,
    data: str | Path | None,
    kind: str,
    value: float,
    methods: Sequence[str] | None,
    heal: int | None,
    out: str | Path | None,
    seed: int,
) -> str:
    """The command line that repeats this job."""
    words = ["parco", "fit", *([] if model is None else [str(model)]), f"--{kind}", f"{value:g}"]
    options = {
        "--data": data,
        "--methods": None if methods is None else ",".join(methods),
        "--heal": heal,
        "--out": out,
        "--seed": seed,
    }
    for name, option in options.items():
        if option is not None:
            words += [name, str(option)]
    return shlex.join(words)
