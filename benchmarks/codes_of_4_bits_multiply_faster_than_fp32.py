"""Claim: on avx512_vbmi `linear_both` multiplies two matrices stored as nvfp4 in two thirds, as mxfp4 in half of the
time of PyTorch's fp32 product, whose operands are there already.

    python benchmarks/codes_of_4_bits_multiply_faster_than_fp32.py [--threads N] [--rounds R]

The shapes are those of training: tokens by inputs, times outputs by inputs. `decoded` is the same product by decoding
both operands first, which is what it takes the place of. `of_peak` is the share of the fp32 peak of this machine.
"""

import argparse
from collections.abc import Callable

import torch
from interleaved import interleave, ratio, save, spread

from parco import decode, encode, machine
from parco.kernels.linear import linear_both

SHAPES = [(4096, 768, 768), (4096, 2048, 768), (4096, 768, 2048), (768, 2048, 4096), (512, 4096, 4096)]
"""Rows, outputs and columns."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peak = machine.peaks(refresh=True).multiply_adds_per_second["fp32"]
    rows: list[dict[str, object]] = []
    for tokens, outputs, columns in SHAPES:
        x, w = torch.randn(tokens, columns), torch.randn(outputs, columns)
        runs: dict[str, Callable[[], object]] = {"torch fp32": lambda x=x, w=w: x @ w.T}
        for name in ("nvfp4", "mxfp4"):
            a, b = encode(x, name), encode(w, name)
            stored = [each.tensors.get(part) for each in (a, b) for part in ("codes", "scale", "global_scale")]
            runs[name] = lambda stored=stored, name=name, columns=columns: linear_both(*stored, name, name, columns)
            runs[f"{name}, decoded"] = lambda a=a, b=b: decode(a) @ decode(b).T
        seconds = interleave(runs, options.rounds)
        for name in runs:
            row: dict[str, object] = {"rows": tokens, "outputs": outputs, "columns": columns, "run": name}
            row |= spread(seconds[name]) | {"times_torch": ratio(seconds["torch fp32"], seconds[name])}
            speed = tokens * outputs * columns / (float(str(row["median_us"])) / 1e6)
            rows.append(row | {"of_peak": round(speed / peak, 2)})
    save(__file__, rows)


if __name__ == "__main__":
    main()
