"""A page's blocks, one after the other: its Python blocks in one process, each of its commands in its own.

These processes are forked from one that has imported parco and Transformers, which takes longer than most of what they
are to do. A command that is more than `parco` and its arguments runs in a shell.
"""

import doctest
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "COLUMNS": "120",
    "NO_COLOR": "1",
    # One thread: the models are so small that more of them only wait for each other.
    "OMP_NUM_THREADS": "1",
}
PROCESSES = multiprocessing.get_context("forkserver")
FOR_A_SHELL = re.compile(r"[|<>&;$`*]|^\w+=")


def start() -> None:
    """Starts the process from which the others are forked, unless it runs; it keeps today's environment."""
    PROCESSES.set_forkserver_preload(["tests.docs.preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        forkserver.ensure_running()


class Page:
    """Runs blocks in `folder`. Each method returns what went wrong, or None."""

    def __init__(self, folder: Path) -> None:
        start()
        self.folder = folder
        self._blocks: Connection | None = None

    def python(self, body: str, place: str) -> str | None:
        """A Python block, which sees the names of those before it."""
        if self._blocks is None:
            self._blocks, theirs = PROCESSES.Pipe()
            self._process = PROCESSES.Process(target=_run_blocks, args=(theirs, self.folder), daemon=True)
            self._process.start()
            theirs.close()
        self._blocks.send((body, place))
        try:
            return self._blocks.recv()  # type: ignore[no-any-return]
        except EOFError:
            self._process.join()
            return f"{place}: the process ended with {self._process.exitcode}"

    def console(self, body: str, place: str) -> str | None:
        """A console block: its commands, with the output that they must have, if any is shown."""
        for text in ("\n" + body).split("\n$ ")[1:]:
            command, _, expected = text.partition("\n")
            words = shlex.split(command)
            if words[0] == "make":  # the target must exist; the continuous integration makes it
                subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
                continue
            code, printed, errors = self._run(command, words)
            if code != 0:
                return f"{place}: `{command}` ended with {code}\n{printed[-4000:]}{errors[-4000:]}"
            right = doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS)
            if expected.strip() and not right:
                return f"{place}: `{command}` printed something else than the page shows:\n{printed}"
        return None

    def _run(self, command: str, words: list[str]) -> tuple[int | None, str, str]:
        if words[0] != "parco" or FOR_A_SHELL.search(command):
            environment = os.environ | ENVIRONMENT
            done = subprocess.run(
                command, shell=True, env=environment, cwd=self.folder, capture_output=True, text=True, check=False
            )
            return done.returncode, done.stdout, done.stderr
        process = PROCESSES.Process(target=_run_command, args=(words, self.folder))
        process.start()
        process.join()
        printed, errors = (self.folder / name for name in ("stdout", "stderr"))
        found = process.exitcode, printed.read_text(), errors.read_text()
        printed.unlink()
        errors.unlink()
        return found

    def close(self) -> None:
        """Ends the process of the Python blocks."""
        if self._blocks is not None:
            self._blocks.close()
            self._process.join()


def _run_blocks(blocks: Connection, folder: Path) -> None:
    os.chdir(folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    while True:
        try:
            body, place = blocks.recv()
        except EOFError:
            return
        blocks.send(_complaint(lambda body=body, place=place: exec(compile(body, place, "exec"), names)))


def _complaint(run: Callable[[], object]) -> str | None:
    try:
        run()
    except BaseException:
        return traceback.format_exc()
    return None


def _run_command(words: list[str], folder: Path) -> None:
    from parco.cli import main

    os.chdir(folder)
    for name, number in (("stdout", 1), ("stderr", 2)):
        with open(name, "w") as file:
            os.dup2(file.fileno(), number)
    sys.argv = words
    main()
