"""Folders that are whole or absent, and errors that say so."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Generator
from pathlib import Path

from safetensors import SafetensorError

from parco.fitting.stages import is_full


def put_in_place(whole: Path, target: Path) -> None:
    """Renames the folder `whole`, after all of it is on the disk, to `target`, whose old content goes."""
    for place in [*whole.rglob("*"), whole]:
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    if target.exists():
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        whole.rename(target)
        shutil.rmtree(old)
    else:
        whole.rename(target)
    handle = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def explained(target: Path) -> Generator[None]:
    """Whatever a library raises where the disk is full becomes an OSError that says that nothing was lost."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch's archive writer and safetensors raise errors of their own, without a number.
        full = is_full(error) or "PytorchStreamWriter failed writing" in str(error) or "unexpected pos" in str(error)
        if not full:
            raise
        raise OSError(
            errno.ENOSPC, "the disk is full: this was not written, what was saved before is whole", str(target)
        ) from error
