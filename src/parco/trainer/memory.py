"""What a run takes of the machine's memory, as Linux counts it."""

from __future__ import annotations

import functools
import gc
import re
from pathlib import Path

from parco import machine


def peak() -> int:
    """The most resident bytes of this process since `forget_peak`, above what it held before its first run."""
    return _read("VmHWM") - before()


@functools.cache
def before() -> int:
    """Resident bytes of this process when this was first called, without what was free by then."""
    _release()
    return _read("VmRSS")


def forget_peak() -> None:
    """Lets VmHWM begin anew, without what a run before left to the allocator; where C library and kernel allow it."""
    _release()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _release() -> None:
    gc.collect()
    machine.release_memory()


def _read(name: str) -> int:
    """Bytes that Linux gives for this process under `name`: VmRSS now, VmHWM at most."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0
