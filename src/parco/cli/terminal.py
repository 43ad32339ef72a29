"""What the commands share: where text goes, progress with the time left, and quiet libraries.

Results go to stdout, everything else to stderr. On a terminal progress is a bar; elsewhere it is a line now and then.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from parco.report.units import duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from parco.fitting.stages import Progress

SECONDS_BETWEEN_LINES = 20.0
LINES_OF_A_RATE = 6
"""The time left is judged by so many last lines, so that a pause is forgotten."""
WIDE = 1000
"""Columns of a console that is no terminal."""
SECONDS_HELD_BACK = 10.0
"""A job that is refused this early says so in one line, without a log of its first steps above it."""

Debug = Annotated[bool, typer.Option("--debug", help="On an error show where it happened.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else on stdout.")]


def console() -> Console:
    """Where results are printed. Nothing is read as markup: a layer's name may hold brackets. In a file or a pipe a
    table is as wide as it needs, unless COLUMNS says otherwise.
    """
    from rich.console import Console

    drawn = sys.stdout.isatty()
    width = None if drawn or "COLUMNS" in os.environ else WIDE
    return Console(markup=False, highlight=False, emoji=False, soft_wrap=not drawn, width=width)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def quiet_libraries() -> None:
    """Send the libraries' warnings to `log.txt` in the cache folder and switch off their own progress bars."""
    from parco.machine import cache_folder

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.captureWarnings(True)
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler: logging.Handler = logging.FileHandler(folder / "log.txt")
    except OSError:
        # A cache that cannot be written costs the log, not the job.
        handler = logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in (None, "torch"):  # torch keeps a handler of its own that writes to stderr
        logging.getLogger(name).handlers = [handler]
    logging.getLogger("torch").propagate = False


def show_notes(notes: tuple[str, ...]) -> None:
    """What is to be known of a model that was loaded or written, on stderr."""
    for note in notes:
        print(f"parco: {note}", file=sys.stderr)


@contextmanager
def progress() -> Generator[Progress]:
    """A Progress that draws bars where stderr is a terminal and prints plain lines elsewhere."""
    if not sys.stderr.isatty():
        lines = Lines()
        yield lines
        lines.close()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[time]}", markup=False),
        TextColumn("{task.fields[shown]}", markup=False, style="dim"),
    )
    with Bars(*columns, console=Console(stderr=True, markup=False, highlight=False, emoji=False)) as bars:
        drawn = Drawn(bars)
        yield drawn
        drawn.close()


class _Rate:
    """How fast a stage goes, by marks that are made now and then."""

    def __init__(self, done: int) -> None:
        self._marks: deque[tuple[float, int]] = deque([(time.monotonic(), done)], maxlen=LINES_OF_A_RATE)

    def is_due(self) -> bool:
        """Whether it is time for a mark, and for a line."""
        return time.monotonic() - self._marks[-1][0] >= SECONDS_BETWEEN_LINES

    def mark(self, done: int) -> None:
        self._marks.append((time.monotonic(), done))

    def left(self, done: int, total: int | None) -> str:
        """The time that the rest takes, or nothing where it cannot be told."""
        then, before = self._marks[0]
        if not total or done <= before:
            return ""
        seconds = (time.monotonic() - then) / (done - before) * (total - done)
        return f"about {duration(float(math.ceil(seconds)))} left"


class Drawn:
    """Progress on a terminal: a bar for every stage, with the time left while it runs and the time taken afterwards."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task: TaskID | None = None
        self._rate = _Rate(0)

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        self.close()
        self._rate = _Rate(done)
        self._task = self._bars.add_task(name, total=total, completed=done, time="", shown="")

    def advance(self, n: int = 1) -> None:
        if self._task is None:
            return
        self._bars.advance(self._task, n)
        task = self._bars.tasks[self._task]
        total = None if task.total is None else int(task.total)
        self._bars.update(self._task, time=self._rate.left(int(task.completed), total))
        if self._rate.is_due():
            self._rate.mark(int(task.completed))

    def note(self, text: str) -> None:
        self._bars.console.print(text, style="dim")

    def show(self, text: str) -> None:
        if self._task is not None:
            self._bars.update(self._task, shown=text)

    def close(self) -> None:
        """A stage ends when the next begins, whether or not it counted its last step."""
        if self._task is not None:
            task = self._bars.tasks[self._task]
            whole = task.total or task.completed or 1
            self._bars.update(self._task, total=whole, completed=whole, time=duration(task.elapsed))
            self._task = None


class Lines:
    """Progress in a file or a pipe: the start of every stage, then a line now and then with the time left."""

    def __init__(self) -> None:
        self._name = self._shown = ""
        self._total: int | None = None
        self._done = 0
        self._start = self._began = time.monotonic()
        self._rate = _Rate(0)
        self._held: list[str] = []

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        self._finish()
        self._name, self._total, self._done, self._shown = name, total, done, ""
        self._began = time.monotonic()
        self._rate = _Rate(done)
        self._say(f"{name}: {total} steps" if total else name)

    def advance(self, n: int = 1) -> None:
        self._done += n
        if not self._name or not self._rate.is_due():
            return
        left = self._rate.left(self._done, self._total)
        self._rate.mark(self._done)
        told = f"{self._done} of {self._total}, {left}" if left else str(self._done)
        self._say(f"{self._name}: {told}" + (f"; {self._shown}" if self._shown else ""))

    def note(self, text: str) -> None:
        self._say(text)

    def show(self, text: str) -> None:
        self._shown = text

    def close(self) -> None:
        """The job is done: say what was held back and how long the last stage took."""
        self._finish()
        self._start -= SECONDS_HELD_BACK
        self._say()

    def _finish(self) -> None:
        if self._name:
            self._say(f"{self._name}: {duration(time.monotonic() - self._began)}")
        self._name = ""

    def _say(self, *texts: str) -> None:
        self._held += texts
        if time.monotonic() - self._start >= SECONDS_HELD_BACK:
            for text in self._held:
                print(text, file=sys.stderr, flush=True)
            self._held = []
