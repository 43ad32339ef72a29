"""Whose folder a run's is: one process works in it, and what goes on is the run that began."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
import transformers

import parco
from parco import machine
from parco.fitting.stages import Progress, write_json

_SETTINGS = "settings.json"


def has_run(out: Path) -> bool:
    """Whether a run began in `out`."""
    return (out / _SETTINGS).exists()


def began(out: Path) -> float:
    """When the run in `out` began, in seconds since 1970."""
    return (out / _SETTINGS).stat().st_mtime


def check(settings: dict[str, Any], defaults: dict[str, Any], out: Path, resume: bool) -> None:
    """Raises FileExistsError where `out` holds something else or `resume` is not asked for, FileNotFoundError where
    there is nothing to go on with, and ValueError where the run there has other `settings`; those that came after it
    had their `defaults`.
    """
    if not has_run(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(f"--out {out} holds something that is no training run: name a new folder")
        if resume:
            raise FileNotFoundError(f"--resume: --out {out} holds no training run; without --resume one begins there")
        return
    if not resume:
        raise FileExistsError(f"--out {out} holds a training run: --resume goes on with it, or name a new folder")
    before = defaults | read(out)
    changed = [
        f"--{name.replace('_', '-')} was {before.get(name)}" for name in settings if settings[name] != before.get(name)
    ]
    if changed:
        raise ValueError(f"--out {out} holds another run: {', '.join(changed)}")


@contextlib.contextmanager
def taken(
    out: Path,
    settings: dict[str, Any],
    defaults: dict[str, Any],
    made_of: dict[str, str],
    known: dict[str, Any],
    ranks: int,
    resume: bool,
    progress: Progress,
) -> Generator[None]:
    """Works in `out` as the only process, for the run of these `settings` that is `made_of` what the digests say; what
    is `known` of its result before it begins is kept beside them.

    Raises ValueError where another process works there or the run that began there was made of something else, and what
    `check` raises. Libraries and machines other than those it began with are told to `progress`: bits may change.
    """
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process trains in --out {out}: wait for it, or name another folder") from error
        except OSError as error:  # some network file systems lock no folders
            progress.note(f"{out} cannot be locked ({error.strerror}): let no other process train there")
        runs_on = {
            "parco": parco.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "ranks": ranks,
            "instructions": machine.isa(),
        }
        if has_run(out):
            check(settings, defaults, out, resume)
            _compare(read(out), made_of, runs_on, out, progress)
        else:
            write_json(out / _SETTINGS, settings | {"made_of": made_of, "runs_on": runs_on, "known": known})
        yield
    finally:
        os.close(handle)


def _compare(
    before: dict[str, Any], made_of: dict[str, str], runs_on: dict[str, Any], out: Path, progress: Progress
) -> None:
    changed = [name for name, digest in before.get("made_of", {}).items() if made_of.get(name) != digest]
    if changed:
        raise ValueError(
            f"--out {out} holds a run whose {' and '.join(changed)} has changed since: put back what it was, or begin "
            "anew in another folder"
        )
    others = [f"{name} {was}" for name, was in before.get("runs_on", {}).items() if runs_on.get(name) != was]
    if others:
        progress.note(f"the run began with {', '.join(others)}: from here on its bits may be others")


def read(out: Path) -> dict[str, Any]:
    """The settings of the run in `out`, with what it was made of and what was known of it when it began."""
    return json.loads((out / _SETTINGS).read_text())


def digest_of(config: transformers.PretrainedConfig) -> str:
    """The SHA-256 of what a model's configuration says, whoever wrote it."""
    said = {name: value for name, value in config.to_dict().items() if name not in ("transformers_version", "dtype")}
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()
