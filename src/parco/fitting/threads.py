"""Threads of the solvers. Small operations and LAPACK's eigensolvers spend two threads' time waiting for one another:
on a busy machine an eigenproblem of 2048 took ten times the processor time on two threads that it takes on one.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Generator[int]:
    """torch on one thread per caller, restored afterwards; yields the number of threads that there were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
