"""What a figure is worth nothing without: its spread, the machine, its peaks, the threads, the versions, the commit."""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

import torch

from parco import machine


class Record(TypedDict):
    """`peaks`: bytes read per second, and multiply-adds per second by element type."""

    machine: dict[str, Any]
    peaks: dict[str, float]
    threads: int
    versions: dict[str, str]
    commit: str


def record(peaks: machine.Peaks, libraries: Sequence[str]) -> Record:
    """As of now; `libraries` are packages whose versions matter besides parco, torch and Python."""
    here = machine.detect()
    return {
        "machine": {
            "cpu": here.cpu,
            "cores": here.cores,
            "isa": machine.isa(),
            "isas": list(here.isas),
            "features": list(here.features),
        },
        "peaks": {"read_bytes_per_second": peaks.read_bytes_per_second, **peaks.multiply_adds_per_second},
        "threads": torch.get_num_threads(),
        "versions": {
            "parco": metadata.version("parco"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            **{library: metadata.version(library) for library in libraries if library != "torch"},
        },
        "commit": _commit(),
    }


def quartiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """The quartiles, the second of which is the median, of at least one time; none of them beyond the extremes."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [*seconds] * 3
    return low, middle, high


def _commit() -> str:
    """The commit of the clone that this file lies in; empty elsewhere."""
    here = Path(__file__)

    def git(*words: str) -> str:
        command = ["git", "-C", str(here.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") if git("ls-files", here.name) else ""
    except OSError:
        return ""
