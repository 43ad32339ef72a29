"""Claim: casts to MX formats are at least four times as fast as torchao's, and casts under one scale a row move at
least 0.3 of the bytes per second that a plain copy does.

`of_copy` is bytes read and written per second over what parco.machine's probe copies per second in the same run.

    python benchmarks/casts_beat_torchao.py [--threads N]
"""

import argparse
from collections.abc import Callable

import torch
from interleaved import interleave, ratio, save, spread

import parco
from parco import machine

SHAPE = (2048, 4096)
FORMATS = ["mxfp8_e4m3", "mxfp4", "nvfp4", "fp8_e4m3:row", "int8:row", "int4:32", "nf4:64"]


def peers(x: torch.Tensor) -> dict[str, Callable[[], object]]:
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    return {
        "mxfp8_e4m3": lambda: to_mx(x, torch.float8_e4m3fn, 32),
        "mxfp4": lambda: to_mx(x, torch.float4_e2m1fn_x2, 32),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    copy = machine.peaks(refresh=True).copy_bytes_per_second
    rows: list[dict[str, object]] = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(SHAPE).to(dtype)
        theirs = peers(x)
        runs: dict[str, Callable[[], object]] = {f"torchao {name}": run for name, run in theirs.items()}
        for name in FORMATS:
            runs[name] = lambda x=x, name=name: parco.encode(x, name)
            runs[f"{name} stochastic"] = lambda x=x, name=name: parco.encode(x, name, rounding="stochastic")
        seconds = interleave(runs, options.rounds)
        copy = max(copy, machine.peaks(refresh=True).copy_bytes_per_second)
        for name in FORMATS:
            moved = x.nbytes + parco.encode(x, name).nbytes
            for kind in (name, f"{name} stochastic"):
                row: dict[str, object] = {"from": str(dtype), "to": kind, **spread(seconds[kind])}
                row["GB_per_s"] = moved / float(str(row["median_us"])) / 1e3
                row["of_copy"] = float(str(row["GB_per_s"])) * 1e9 / copy
                if kind in theirs:
                    row["times_torchao"] = ratio(seconds[f"torchao {kind}"], seconds[kind])
                rows.append(row)
    save(__file__, rows)


if __name__ == "__main__":
    main()
