"""Claim: half of a matrix is read in less than half of the time. One row of bf16 times 50% sparse int8 weights takes at
most 1/2.2 of torch's time for dense bf16 ones, and many rows times half of the blocks at most 1/1.7 of our own.

Decode: weights are cold, each call takes the next of enough copies to fill `--cold` MB, which is well over the last
cache. Torch's product of bf16 weights runs in the same rounds, and right after each storage a plain read of another
copy of its numbers: `of_plain_read` is the product's bytes per second (masks, blocks and scales are among them) over
the read's. Prefill: `times_dense_bf16` is over `linear_dense` in the same rounds.

    python benchmarks/sparse_weights_decode_faster.py [--threads N] [--cold MB]
"""

import argparse
import statistics
from itertools import count

import torch
from interleaved import interleave, ratio, save, spread, stored_copies

from parco import _C, machine, weights
from parco.weights import Weight

SIZE = 4096
DECODE = [
    *("bitmap(int8:row, {0}, 2048)", "semisparse(int8:row, {0})", "bitmap(bf16, {0}, 2048)"),
    *("bitmap(int4:row, {0}, 2048)", "bitmap(int4:32, {0}, 2048)"),
    *("blocksparse(bf16, {0}, 32, 64)", "blocksparse(int8:row, {0}, 32, 64)"),
]
PREFILL = [
    *("blocksparse(bf16, {0}, 16, 128)", "blocksparse(bf16, {0}, 32, 64)", "blocksparse(bf16, {0}, 64, 32)"),
    *("blocksparse(int8:row, {0}, 32, 64)", "bitmap(bf16, {0}, 2048)", "semisparse(int8:row, {0})"),
]
PREFILL_ROWS = 512


def specs(texts: list[str]) -> list[Weight]:
    return [weights.parse(text.format(f"{SIZE}x{SIZE}")) for text in texts]


def decode(threads: int, cold: int, rounds: int) -> list[dict[str, object]]:
    x = torch.randn(1, SIZE).bfloat16()
    nbytes = 2 * SIZE * SIZE
    dense = [torch.randn(SIZE, SIZE).bfloat16() for _ in range(cold // nbytes + 1)]
    turn = count()
    runs = {"torch bf16": lambda: torch.nn.functional.linear(x, dense[next(turn) % len(dense)])}
    sizes: dict[str, int] = {}
    for spec in specs(DECODE):
        stored = stored_copies(spec, cold // spec.nbytes + 1)

        def run(spec: Weight = spec, stored: list[tuple[torch.Tensor, ...]] = stored) -> torch.Tensor:
            return spec.apply(x, *stored[next(turn) % len(stored)])

        def read(stored: list[tuple[torch.Tensor, ...]] = stored) -> None:
            numbers = stored[next(turn) % len(stored)][0]
            _C.machine_read_once(machine.isa(), numbers.data_ptr(), numbers.nbytes, threads)

        runs[str(spec)], runs[f"read {spec}"] = run, read
        sizes[str(spec)] = stored[0][0].nbytes
    seconds = interleave(runs, rounds)
    rows: list[dict[str, object]] = [{"rows": 1, "weights": "torch bf16", **spread(seconds["torch bf16"])}]
    for spec in specs(DECODE):
        name = str(spec)
        rows.append(
            {"rows": 1, "weights": name, **spread(seconds[name])}
            | {"GB_per_s": spec.nbytes / statistics.median(seconds[name]) / 1e9}
            | {"times_torch_bf16": ratio(seconds["torch bf16"], seconds[name])}
            | {"of_plain_read": ratio(seconds[f"read {name}"], seconds[name]) * spec.nbytes / sizes[name]}
        )
    return rows


def prefill(rounds: int) -> list[dict[str, object]]:
    x = torch.randn(PREFILL_ROWS, SIZE).bfloat16()
    dense = f"dense(bf16, {SIZE}x{SIZE})"
    runs = {}
    for spec in (weights.parse(dense), *specs(PREFILL)):
        (stored,) = stored_copies(spec, 1)
        runs[str(spec)] = lambda spec=spec, stored=stored: spec.apply(x, *stored)
    seconds = interleave(runs, rounds)
    flops = 2 * PREFILL_ROWS * SIZE * SIZE
    return [
        {"rows": PREFILL_ROWS, "weights": name, **spread(seconds[name])}
        | {"dense_GFLOP_per_s": flops / statistics.median(seconds[name]) / 1e9}
        | {"times_dense_bf16": ratio(seconds[dense], seconds[name])}
        for name in runs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--cold", type=int, default=700)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        rows = decode(options.threads, options.cold << 20, options.rounds) + prefill(max(4, options.rounds // 5))
    save(__file__, rows)


if __name__ == "__main__":
    main()
