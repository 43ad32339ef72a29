"""The program: its commands, and what becomes of an error.

Wrong input (ValueError, TypeError, OSError, a wrong option) and a training whose numbers stopped being finite
(FloatingPointError) are one line on stderr and exit code 2; `--debug` shows the traceback instead.
Ctrl-C exits with 130 and says how to go on. Any other exception is a defect of parco and keeps its traceback.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import typer

from parco.cli import bench, evaluate, explain, export, fit, generate, machine, merge, report, train, tune

app = typer.Typer(
    name="parco",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a transformer cheaper on this machine, in size, speed and training, and see what it cost.",
)
for name, command, summary in (
    ("fit", fit.fit, "Make a model smaller and faster."),
    ("eval", evaluate.evaluate, "Measure a model's loss and speed."),
    ("generate", generate.generate, "Let a model write."),
    ("explain", explain.explain, "Show what was chosen for each layer, and why."),
    ("export", export.export, "Write a model for another program, or from its files."),
    ("train", train.train, "Train a model by a recipe of low precision, or by several side by side."),
    ("tune", tune.tune, "Adapt a model to texts or chats, in few parameters."),
    ("merge", merge.merge, "Make an adapter part of its model."),
    ("report", report.report, "Make the page and the tables of a fit or a training again, also while it goes on."),
    ("bench", bench.bench, "Time every storage on a model's shapes, or the whole model, beside other libraries."),
    ("machine", machine.machine, "Show what this machine can do."),
):
    app.command(name, short_help=summary)(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `parco` with `arguments` (default: the process's own); return its exit code: 0, 2 wrong input, 130 Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        status = app(args=words, prog_name="parco", standalone_mode=False)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; keep the interpreter from complaining again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (typer.TyperException, ValueError, TypeError, OSError, FloatingPointError) as error:
        if "--debug" in words:
            raise
        print(f"parco: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        status = 130
    if status == 130:
        print(_how_to_go_on(words), file=sys.stderr)
    return status if isinstance(status, int) else 0


def _one_line(error: Exception) -> str:
    """What was wrong, without line breaks: scripts and people read the last line of stderr."""
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    elif isinstance(error, typer.BadParameter) and hasattr(error.__cause__, "errors"):
        text = _mistyped(error)
    else:
        # Typer's own errors keep the name of the option apart from the message.
        text = str(getattr(error, "format_message", error.__str__)())
    return " ".join(text.split()) or type(error).__name__


def _mistyped(error: Any) -> str:
    """A value that is no number, and what its option takes: Typer's own words leave out both."""
    found, option = error.__cause__.errors()[0], error.param
    kind = {"float_parsing": "a number", "int_parsing": "a whole number"}.get(found["type"], found["msg"])
    return f"{option.opts[0]} {found['input']} makes no sense: it must be {kind}. {option.help}"


def _how_to_go_on(words: list[str]) -> str:
    by_path = os.path.basename(sys.argv[0]) == "parco" and shutil.which("parco") is None  # as `make fit` calls it
    name = sys.argv[0] if by_path else "parco"
    if words[:1] == ["fit"]:
        again = shlex.join([name, *(word for word in words if word != "--fresh")])
        return f"parco: interrupted; every finished stage is kept. To go on from there: {again}"
    if words[:1] in (["train"], ["tune"]):
        again = shlex.join([name, *(word for word in words if word != "--resume"), "--resume"])
        return f"parco: interrupted; checkpoints are kept. To go on from the last one: {again}"
    return "parco: interrupted"
