"""What goes wrong on a disk, in words that say what is still whole."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Generator
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError

from parco.fitting.stages import is_full


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


@contextlib.contextmanager
def read(file: Path) -> Generator[Path]:
    """`file` of a checkpoint, to be read. Whatever a library raises of one that is missing or broken becomes a
    ValueError that names it and the checkpoint to go on from instead.
    """
    try:
        yield file
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        folder = file.parent
        others = [each.name for each in folder.parent.glob("checkpoint-*") if each != folder]
        instead = f"goes on from {max(others, key=_number)}" if others else "begins anew"
        state = "damaged" if file.exists() else "missing"
        raise ValueError(f"{file} is {state}: remove the folder {folder}, and --resume {instead}") from error


def _number(name: str) -> int:
    return int(name.rpartition("-")[2])
