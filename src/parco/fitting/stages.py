"""Stages of a long job on disk: each result is whole or absent, and a rerun goes on from the last whole one.

A stage lives in a folder whose name holds a hash of everything its result depends on, and of how it is written, so a
changed setting never meets a stale result and stages that it does not touch are kept. Inside a stage every file is
written to a temporary name, synced and renamed; the stage is whole once `whole.json` is there. That holds after SIGKILL
at any moment: what is half-written has a temporary name and is removed by the next run. One process at a time works in
a folder (flock).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LAYOUT = 4
"""Of what stages write: another number wherever a file's name, tensors or note change, so that a job that was begun
before begins anew and does not read what it would not understand.
"""


class Progress(Protocol):
    """Who is told how far the job is. `total` is in the stage's own steps, None when unknown; `done` of them were
    before, in a job that goes on. A note stays, what is shown belongs to the running stage until something else is.
    """

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None: ...
    def advance(self, n: int = 1) -> None: ...
    def note(self, text: str) -> None: ...
    def show(self, text: str) -> None: ...


def tell(progress: Progress, notes: Iterable[str]) -> None:
    """Passes on the notes of a model that was loaded."""
    for note in notes:
        progress.note(note)


class Silent:
    """A Progress that says nothing."""

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None: ...

    def advance(self, n: int = 1) -> None: ...

    def note(self, text: str) -> None: ...

    def show(self, text: str) -> None: ...


def digest(value: object) -> str:
    """The first 16 hex digits of the SHA-256 of a value's canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file under a temporary name, sync it and rename it to `path`.

    Raises OSError (ENOSPC) naming the disk when it is full; nothing is left of the file then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if is_full(error):
            raise OSError(
                errno.ENOSPC, f"the disk is full: {path.name} could not be written to {path.parent}"
            ) from error
        raise


def is_full(error: BaseException) -> bool:
    """Whether an error of any library means that a disk has no space left."""
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=1, sort_keys=True) + "\n"
    write_whole(path, lambda temporary: void(temporary.write_text(text)))


def void(_: object) -> None:
    """Drops a return value where a callable must return nothing."""


class Stage:
    """One stage's folder. Files are addressed by name without suffix."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.resumed = self.whole
        self._began = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        for partial in folder.glob(".*.partial"):
            partial.unlink()

    @property
    def whole(self) -> bool:
        return (self.folder / "whole.json").exists()

    @property
    def seconds(self) -> float:
        """Wall time of the run that finished the stage; 0 while it is not whole."""
        return float(json.loads((self.folder / "whole.json").read_text())["seconds"]) if self.whole else 0.0

    def has(self, name: str) -> bool:
        return (self.folder / f"{name}.json").exists() or (self.folder / f"{name}.safetensors").exists()

    def write(self, name: str, value: object) -> None:
        write_json(self.folder / f"{name}.json", value)

    def read(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text())

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], note: object = None) -> None:
        """Tensors as safetensors, with an optional JSON note in the same file: both are whole or absent together."""
        contiguous = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        metadata = {"note": json.dumps(note, sort_keys=True)}
        write_whole(self.folder / f"{name}.safetensors", lambda path: save_file(contiguous, path, metadata=metadata))

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def read_note(self, name: str) -> Any:
        """The JSON note of a tensor file."""
        with (self.folder / f"{name}.safetensors").open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return json.loads(header["__metadata__"]["note"])

    def drop(self, pattern: str) -> None:
        """Remove bulky files that no later stage reads."""
        for path in self.folder.glob(pattern):
            path.unlink()

    def finish(self) -> None:
        """Mark the stage as whole."""
        if not self.whole:
            write_json(self.folder / "whole.json", {"seconds": time.perf_counter() - self._began})


class Stages:
    """The work folder of one job. Use as a context manager: it holds the folder's lock.

    Raises ValueError when another process works in the folder.
    """

    def __init__(self, folder: Path, progress: Progress, fresh: bool = False) -> None:
        self.folder = folder
        self.progress = progress
        self.opened: list[Stage] = []
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ValueError(f"another parco fit is working in {folder}: wait for it or give another --out") from error
        if fresh:
            for child in folder.iterdir():
                if child.is_dir():
                    shutil.rmtree(child)

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def open(self, name: str, **key: object) -> Stage:
        """The stage `name` whose result depends on `key` (JSON values)."""
        folder = self.folder / f"{name}-{digest({'layout': LAYOUT, **key})}"
        for known in self.opened:
            if known.folder == folder:
                return known
        stage = Stage(name, folder)
        self.opened.append(stage)
        return stage

    def remove(self) -> None:
        """Delete the work folder: the job is done and its result is saved."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def remove_if_empty(self) -> None:
        """A job that was refused before its first stage leaves no work folder."""
        if not any(child.is_dir() for child in self.folder.iterdir()):
            self.remove()


def seeded(seed: int, *names: object) -> torch.Generator:
    """A CPU generator that depends on the job's seed and on what the draw is for, not on what was drawn before."""
    number = int(digest([seed, *map(str, names)]), 16) % (1 << 63)
    return torch.Generator().manual_seed(number)
