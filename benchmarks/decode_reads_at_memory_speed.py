"""Claim: one row of bf16 times stored weights takes little longer than reading them, and less time the fewer bits.

Weights are cold: each call takes the next of enough copies to fill `--cold` MB. Torch's product of bf16 weights runs in
the same rounds, and right after each format a plain read of another copy of its codes. `of_plain_read` is the product's
bytes per second (scales are among them) over the read's, the median over the rounds. A format has `--calls` calls in a
row, as the layers of a model that is stored in it have.

    python benchmarks/decode_reads_at_memory_speed.py [--threads N] [--rows M] [--cold MB] [--calls N]
"""

import argparse
import statistics
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--cold", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cold = options.cold << 20
    isa = machine.isa()
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

            def read(stored=stored, turn=turn) -> None:
                codes = stored[next(turn) % len(stored)][0]
                _C.machine_read_once(isa, codes.data_ptr(), codes.nbytes, options.threads)

            runs[name] = run
            runs[f"read {name}"] = read
            sizes[f"read {name}"] = stored[0][0].nbytes
        with torch.inference_mode():
            seconds = interleave(runs, options.rounds, options.calls)
        for name in ("torch bf16", *FORMATS):
            rows.append(
                {"rows": options.rows, "weights": f"{shape[0]}x{shape[1]}", "format": name, **spread(seconds[name])}
                | {"GB_per_s": sizes[name] / statistics.median(seconds[name]) / 1e9}
                | {"times_torch_bf16": ratio(seconds["torch bf16"], seconds[name])}
            )
            if name in FORMATS:
                share = sizes[name] / sizes[f"read {name}"]
                rows[-1]["of_plain_read"] = ratio(seconds[f"read {name}"], seconds[name]) * share
    save(__file__, rows)


if __name__ == "__main__":
    main()
