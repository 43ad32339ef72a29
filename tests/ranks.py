"""Two ranks on gloo for tests: one pair of processes for all cases of a file, because starting one takes seconds."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2


def on_two_ranks(
    work: Callable[..., Any], cases: Sequence[tuple[Any, ...]], folder: Path
) -> dict[tuple[Any, ...], Any]:
    """What `work(rank, *case)` returns on rank 0, by case: tensors, numbers and texts. Both ranks run every case."""
    mp.spawn(_run, (work, cases, str(folder)), nprocs=RANKS)
    return dict(zip(cases, torch.load(folder / "results.pt", weights_only=True), strict=True))


def _run(rank: int, work: Callable[..., Any], cases: Sequence[tuple[Any, ...]], folder: str) -> None:
    torch.set_num_threads(1)
    meeting = dist.FileStore(f"{folder}/meeting", RANKS)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=RANKS, timeout=timedelta(minutes=2))
    results = [work(rank, *case) for case in cases]
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()  # nobody leaves while another still waits for an answer
    dist.destroy_process_group()
