"""Claim: one row of bf16 times stored integers takes little longer than reading them, 2.5 to 4 times as fast as torch's
bf16.

`of_plain_read` compares the best round with the best plain read. Weights are cold: each call takes the next of enough
copies to fill 300 MB. The yardsticks in the same rounds are torch's product of bf16 weights and a plain read of as
many bytes by parco.machine's probe. 3 and 2 bits cost more to unpack than to read.

    python benchmarks/int4_decode_reads_at_memory_speed.py [--threads N]
"""

import argparse
from itertools import count

import torch
from interleaved import interleave, random_codes, ratio, save, spread

from parco import _C, machine
from parco.kernels.linear import linear_int

SHAPES = [(2048, 2048), (5632, 2048), (4096, 4096)]
FORMATS = {"int4:32": (4, 32), "int4:128": (4, 128), "int8:row": (8, 0), "int3:64": (3, 64)}
COLD = 300 << 20


def plain_read(threads: int) -> float:
    """Bytes per second of the best of several passes over a cold buffer: other work on the machine only slows them."""
    return max(_C.machine_read_bytes_per_second(machine.isa(), COLD, threads, 1) for _ in range(6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    read = plain_read(options.threads)
    rows: list[dict[str, object]] = []
    for outputs, columns in SHAPES:
        x = torch.randn(1, columns).bfloat16()
        copies = COLD // (2 * outputs * columns) + 1
        dense = [torch.randn(outputs, columns).bfloat16() for _ in range(copies)]
        turn = count()
        runs = {
            "torch bf16": lambda x=x, dense=dense, turn=turn: torch.nn.functional.linear(
                x, dense[next(turn) % len(dense)]
            )
        }
        sizes = {"torch bf16": 2 * outputs * columns}
        for name, (bits, group) in FORMATS.items():
            stored = random_codes(
                (outputs, columns), bits, group or columns, COLD * 8 // (bits * outputs * columns) + 1
            )
            sizes[name] = sum(tensor.nbytes for tensor in stored[0])

            def run(x=x, stored=stored, bits=bits, group=group or columns, columns=columns, turn=turn) -> torch.Tensor:
                return linear_int(x, *stored[next(turn) % len(stored)], None, None, bits, group, columns)

            runs[name] = run
        with torch.inference_mode():
            seconds = interleave(runs, options.rounds)
        read = max(read, plain_read(options.threads))
        for name in runs:
            median = spread(seconds[name])
            best = sizes[name] / min(seconds[name])
            rows.append(
                {"weights": f"{outputs}x{columns}", "format": name, **median, "best_GB_per_s": best / 1e9}
                | {"of_plain_read": best / read, "times_torch_bf16": ratio(seconds["torch bf16"], seconds[name])}
            )
    save(__file__, rows)


if __name__ == "__main__":
    main()
