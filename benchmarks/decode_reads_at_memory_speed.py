"""Claim: one row of bf16 times stored weights takes little longer than reading them, and less time the fewer bits.

`of_plain_read` compares the best round with the best plain read. Weights are cold: each call takes the next of enough
copies to fill `--cold` MB. The yardsticks in the same rounds are torch's product of bf16 weights and a plain read of as
many bytes by parco.machine's probe.

    python benchmarks/decode_reads_at_memory_speed.py [--threads N] [--rows M] [--cold MB]
"""

import argparse
from itertools import count

import torch
from interleaved import interleave, ratio, save, spread, stored_copies

from parco import _C, machine
from parco.weights import Quantized

SHAPES = [(2048, 2048), (5632, 2048), (4096, 4096)]
FORMATS = [
    *("int8:row", "int4:32", "int4:128", "int3:64", "nf4:64", "ternary", "ternary:128"),
    *("fp8_e4m3:row", "fp8_e5m2:row", "fp8_e4m3:128x128", "mxfp8_e4m3", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "nvfp4"),
]


def plain_read(threads: int, size: int) -> float:
    """Bytes per second of the best of several passes over a cold buffer: other work on the machine only slows them."""
    return max(_C.machine_read_bytes_per_second(machine.isa(), size, threads, 1) for _ in range(6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--cold", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cold = options.cold << 20
    read = plain_read(options.threads, cold)
    rows: list[dict[str, object]] = []
    for shape in SHAPES:
        x = torch.randn(options.rows, shape[1]).bfloat16()
        dense = [torch.randn(shape).bfloat16() for _ in range(cold // (2 * shape[0] * shape[1]) + 1)]
        turn = count()
        runs = {
            "torch bf16": lambda x=x, dense=dense, turn=turn: torch.nn.functional.linear(
                x, dense[next(turn) % len(dense)]
            )
        }
        sizes = {"torch bf16": 2 * shape[0] * shape[1]}
        for name in FORMATS:
            spec = Quantized(name, shape)
            sizes[name] = spec.nbytes
            stored = stored_copies(spec, cold // spec.nbytes + 1)

            def run(x=x, spec=spec, stored=stored, turn=turn) -> torch.Tensor:
                return spec.apply(x, *stored[next(turn) % len(stored)])

            runs[name] = run
        with torch.inference_mode():
            seconds = interleave(runs, options.rounds)
        read = max(read, plain_read(options.threads, cold))
        for name in runs:
            median = spread(seconds[name])
            best = sizes[name] / min(seconds[name])
            rows.append(
                {"rows": options.rows, "weights": f"{shape[0]}x{shape[1]}", "format": name, **median}
                | {"best_GB_per_s": best / 1e9, "of_plain_read": best / read}
                | {"times_torch_bf16": ratio(seconds["torch bf16"], seconds[name])}
            )
    save(__file__, rows)


if __name__ == "__main__":
    main()
