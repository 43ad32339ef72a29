"""How a claim is measured: all contenders in turn in one process, medians and spread, ratios inside one run only."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

import parco
from parco import machine
from parco.weights import Sparse, Weight

RESULTS = Path(__file__).parents[1] / "results"


def interleave(
    runs: Mapping[str, Callable[[], object]], rounds: int, calls: int = 1, warm: int = 2
) -> dict[str, list[float]]:
    """Seconds of one call of each contender in each round, after `warm` rounds that are not counted.

    With one thread they are seconds of its own CPU time, which other work on the machine disturbs less.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + warm):
        for name, run in runs.items():
            begin = clock()
            for _ in range(calls):
                run()
            if turn >= warm:
                seconds[name].append((clock() - begin) / calls)
    return seconds


def spread(seconds: list[float]) -> dict[str, float]:
    """Microseconds: the median and the quartiles, or of less than four rounds the extremes."""
    low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
    if len(seconds) >= 4:
        low, middle, high = statistics.quantiles(seconds, n=4)
    return {"median_us": middle * 1e6, "quartile1_us": low * 1e6, "quartile3_us": high * 1e6}


def ratio(peer: list[float], ours: list[float]) -> float:
    """How many times faster `ours` is: the median over rounds, each compared with the peer's call beside it."""
    return statistics.median(theirs / mine for theirs, mine in zip(peer, ours, strict=True))


def stored_copies(spec: Weight, copies: int) -> list[tuple[torch.Tensor, ...]]:
    """The packed tensors of a random matrix (a composite's parts each have their own), stored as `spec` says, so many
    times; random, since zeros run faster.
    """
    tensors = spec.pack(*_random(spec, torch.Generator().manual_seed(0)))
    return [tensors, *(tuple(tensor.clone() for tensor in tensors) for _ in range(copies - 1))]


def _random(spec: Weight, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    parts = spec.parts()
    if parts:
        return sum((_random(part, generator) for part in parts.values()), ())
    matrix = torch.randn(spec.shape, generator=generator) / spec.shape[1] ** 0.5
    if isinstance(spec, Sparse):
        matrix *= spec.keep(matrix.abs())
    return spec.encode(matrix)


def waiting(run: Callable[[], object]) -> Callable[[], None]:
    """`run` and whatever CUDA still has to do for it."""

    def both() -> None:
        run()
        torch.cuda.synchronize()

    return both


def save(claim: str, rows: list[dict[str, object]], on_gpu: bool = False) -> None:
    """Print the rows and leave them in results/ with the machine, the versions and the commit; those of a GPU in a file
    of their own.
    """
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    found = machine.detect()
    name = Path(claim).stem + ("_on_a_gpu" if on_gpu else "")
    document = {
        "claim": name,
        "machine": {
            "cpu": found.cpu,
            "cores": found.cores,
            "isa": machine.isa(),
            "isas": found.isas,
            "features": found.features,
        }
        | ({"gpu": torch.cuda.get_device_name()} if on_gpu else {}),
        "threads": torch.get_num_threads(),
        "versions": {"parco": parco.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": commit.stdout.strip(),
        "rows": rows,
    }
    for row in rows:
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
