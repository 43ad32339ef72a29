"""Claim: where there is no AMX, 512 rows times stored weights run faster than torch's bf16 product: at least 1.5 times
as fast where a format computes in integers and its groups are not the shortest, 1.3 times elsewhere.

`of_peak` is the share of the 16-bit integer peak that parco.machine measures
on operands in L1. torch's fp32 product is shown beside them: on processors whose bf16 dot products are slow it is the
faster peer.

    python benchmarks/prefill_beats_torch_bf16.py [--threads N] [--rows M]
"""

import argparse
from typing import cast

import torch
from interleaved import interleave, ratio, save, spread, stored_copies

from parco import machine
from parco.weights import Quantized

SHAPES = [(320, 320), (832, 320), (320, 832), (2048, 2048), (5632, 2048), (2048, 5632)]
FORMATS = ["int8:row", "int4:32", "int4:64", "nf4:64", "ternary", "fp8_e4m3:row", "mxfp8_e4m3", "mxfp4", "nvfp4"]


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
        for name in FORMATS:
            spec = Quantized(name, (outputs, columns))
            (stored,) = stored_copies(spec, 1)

            def run(x=x, spec=spec, stored=stored) -> torch.Tensor:
                return spec.apply(x, *stored)

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
