"""Columns decided one after the other, each making up for the error of those before it: the pass of GPTQ and SparseGPT.

With H = (U + I) D (U + I)ᵀ, U strictly upper triangular, what is stored of column k is a decision about the value

    w_k + Σ_{i<k} (w_i − stored_i) U_ik,

rounding it, setting it to zero, or both (LDLQ, arXiv 2307.13304: the equal, without an inverse, of updating all
remaining columns by a row of the Cholesky factor of H⁻¹). The error tr(ΔHΔᵀ) is then Σ_k D_kk · (what the decision
about column k changed)², whatever the decisions are; D_kk is 1 / [H⁻¹]_kk of the columns from k on.

Everything is transposed, [columns, rows]: a column of all rows is one contiguous vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from parco.fitting.threads import one_thread

CHUNK_ROWS = 1024
SPAN = 128
BLOCK = 32


def sweep(
    target_KN: Tensor,
    delta_KN: Tensor,
    factor: Tensor,
    spans: Iterable[tuple[int, int]],
    decide: Callable[[int, Tensor], object],
    *,
    reach: Callable[[int, int, Tensor], object] | None = None,
    near: Callable[[int, int, Tensor], object] | None = None,
    block: int = BLOCK,
) -> None:
    """One pass over the columns of `target_KN`, with `factor` [K, K] = (U + I) √D upper triangular.

    spans: (first, last) of consecutive columns whose compensation by all before them is one product. `reach(first,
    last, values)` sees the values [last − first, N] of a span when it is reached, with the terms of the sum that come
    from the columns before it; `near` likewise those of every `block` columns within a span. `decide(column, value)`
    must leave target − stored in delta_KN[column].
    """
    pivots = factor.diagonal()
    for start, stop in spans:
        feedback = (factor[:stop, start:stop] / pivots[start:stop]).T.contiguous()
        aim = torch.addmm(target_KN[start:stop], feedback[:, :start], delta_KN[:start])
        if reach is not None:
            reach(start, stop, aim)
        for first in range(start, stop, block):
            last = min(first + block, stop)
            here = slice(first - start, last - start)
            if first > start:
                aim[here].addmm_(feedback[here, start:first], delta_KN[start:first])
            if near is not None:
                near(first, last, aim[here])
            for column in range(first, last):
                row = column - start
                decide(column, torch.addmv(aim[row], delta_KN[first:column].T, feedback[row, first:column]))


def over_rows(rows: int, run: Callable[[int, int], None], multiple: int = 1) -> None:
    """`run(first, last)` for chunks of about a thousand rows, cut by the number of rows alone (at multiples of
    `multiple`), each by one thread of a pool.

    Rows are independent, and thousands of small operations on two threads each would mostly wait for one another. So a
    result depends neither on the run nor on the number of threads.
    """
    parts = max(1, -(-rows // CHUNK_ROWS))
    height = -(-rows // (parts * multiple)) * multiple
    inference = torch.is_inference_mode_enabled()  # a mode of the calling thread, which the pool's do not inherit

    @torch.inference_mode(inference)
    def chunk(first: int) -> None:
        run(first, min(first + height, rows))

    with one_thread() as threads, ThreadPoolExecutor(max_workers=min(threads, parts)) as pool:
        jobs = [pool.submit(chunk, first) for first in range(0, rows, height)]
        try:
            for job in jobs:
                job.result()
        except BaseException:  # also an interrupt by the keyboard: chunks that have not begun are not waited for
            pool.shutdown(cancel_futures=True)
            raise
