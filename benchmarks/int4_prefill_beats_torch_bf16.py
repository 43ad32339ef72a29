"""Claim: 512 rows times stored integers run at least 1.5 times as fast as torch's bf16 product where there is no AMX.

The same bits come out as for one row. `of_peak` is the share of the 16-bit integer peak that parco.machine measures
on operands in L1. torch's fp32 product is shown beside them: on processors whose bf16 dot products are slow it is the
faster peer.

    python benchmarks/int4_prefill_beats_torch_bf16.py [--threads N] [--rows M]
"""

import argparse
from typing import cast

import torch
from interleaved import interleave, random_codes, ratio, save, spread

from parco import machine
from parco.kernels.linear import linear_int

SHAPES = [(320, 320), (832, 320), (320, 832), (2048, 2048), (5632, 2048), (2048, 5632)]
FORMATS = {"int4:32": (4, 32), "int4:64": (4, 64), "int8:row": (8, 0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peak = machine.peaks(refresh=True).multiply_adds_per_second["int16"]
    rows: list[dict[str, object]] = []
    for outputs, columns in SHAPES:
        x, dense = torch.randn(options.rows, columns).bfloat16(), torch.randn(outputs, columns).bfloat16()
        wide_x, wide = x.float(), dense.float()
        runs = {
            "torch bf16": lambda x=x, dense=dense: torch.nn.functional.linear(x, dense),
            "torch fp32": lambda x=wide_x, dense=wide: torch.nn.functional.linear(x, dense),
        }
        for name, (bits, group) in FORMATS.items():
            (stored,) = random_codes((outputs, columns), bits, group or columns, 1)

            def run(x=x, stored=stored, bits=bits, group=group or columns, columns=columns) -> torch.Tensor:
                return linear_int(x, *stored, None, None, bits, group, columns)

            runs[name] = run
        with torch.inference_mode():
            seconds = interleave(runs, options.rounds)
        for name in runs:
            median = spread(seconds[name])
            speed = options.rows * outputs * columns / (median["median_us"] * 1e-6)
            rows.append(
                {"rows": options.rows, "weights": f"{outputs}x{columns}", "format": name, **median}
                | {"G_multiply_adds_per_s": speed / 1e9}
                | {"times_torch_bf16": ratio(seconds["torch bf16"], seconds[name])}
            )
    # The probe too is slowed by other work: the better of before and after counts.
    peak = max(peak, machine.peaks(refresh=True).multiply_adds_per_second["int16"])
    for row in rows:
        row["of_peak"] = cast(float, row["G_multiply_adds_per_s"]) * 1e9 / peak
    save(__file__, rows)


if __name__ == "__main__":
    main()
