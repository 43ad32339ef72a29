"""Claim: PyTorch's dropout takes more than five times as long as ours, forward and backward, and keeps a mask where
ours keeps a seed; ours takes at most four times as long as a copy of its bytes.

    python benchmarks/dropout_beats_torch_and_keeps_a_seed.py [--threads N] [--rounds R]

PyTorch's dropout runs in the same rounds, with its backward, and so do parco's kernels for all instruction sets that
this machine has. `of_copy` is the share of the speed of `clone` of the same matrix: once forward, twice forward and
backward. What is missing are the random bits: ten rounds of two products for four numbers, about a cycle of AVX-512 for
each number. `kept` are the bytes held between forward and backward.
"""

import argparse
from collections.abc import Callable

import torch
from interleaved import interleave, ratio, save, spread
from torch import Tensor
from torch.nn import functional

from parco import machine
from parco.kernels import table
from parco.kernels.rowwise import dropout

P = 0.1
SHAPES = (4096, 768), (2048, 4096)
COPY, PEER, OURS = "copy", "torch", "parco"


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """Of the tensors that autograd keeps of one forward."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: sizes.append(kept.nbytes) or kept, lambda kept: kept):
        run()
    return sum(sizes)


def measure(shape: tuple[int, int], dtype: torch.dtype, rounds: int) -> list[dict[str, object]]:
    x, grad = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    leaf, seed = x.clone().requires_grad_(), torch.tensor([1])
    forward: dict[str, Callable[[], Tensor]] = {
        PEER: lambda: functional.dropout(leaf, P),
        OURS: lambda: dropout(leaf, seed, P),
    }
    runs: dict[str, Callable[[], object]] = {COPY: x.clone, **forward}
    runs |= {f"{name}, both": lambda run=run: torch.autograd.grad(run(), leaf, grad) for name, run in forward.items()}
    usable = (k for k in table.operations()["dropout"].kernels if k.isa in machine.detect().isas)
    runs |= {kernel.name: lambda kernel=kernel: kernel.run(x, seed, P) for kernel in usable}
    seconds = interleave(runs, rounds)
    rows: list[dict[str, object]] = []
    for name in runs:
        passes, peer = (2, f"{PEER}, both") if name.endswith("both") else (1, PEER)
        row: dict[str, object] = {"shape": shape, "dtype": str(dtype), "run": name, **spread(seconds[name])}
        row |= {"of_copy": passes * ratio(seconds[COPY], seconds[name])}
        row |= {"times_torch": ratio(seconds[peer], seconds[name])}
        rows.append(row | ({"kept": kept_bytes(forward[name])} if name in forward else {}))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kinds = [(shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]
    save(__file__, [row for shape, dtype in kinds for row in measure(shape, dtype, options.rounds)])


if __name__ == "__main__":
    main()
