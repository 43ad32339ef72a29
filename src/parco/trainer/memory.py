"""What a run takes of the machine's memory, as Linux counts it."""

from __future__ import annotations

import ctypes
import functools
import gc
import re
from pathlib import Path
from typing import Any


def resident(name: str) -> int:
    """Bytes that Linux gives for this process under `name`: VmRSS now, VmHWM at most."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


@functools.cache
def before_runs() -> int:
    """Resident bytes of this process before its first run."""
    return resident("VmRSS")


def forget_peak() -> None:
    """Lets VmHWM begin anew, without what a run before left to the allocator; where C library and kernel allow it."""
    gc.collect()
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
