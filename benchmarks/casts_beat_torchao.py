"""Claim: casts to mxfp4 are at least 50 times as fast as torchao's, to mxfp8 10 times; casts of fp32 and bf16 to MX
formats and to fp8 and int8 by row move about half of the bytes per second that a plain copy does, or more.

`of_copy` is bytes read and written per second over what a copy of the same matrix, `to.copy_(from)`, reads and writes
per second in the same rounds; `of_copied_bytes` is the same over the bytes that it copies, each of which it reads and
writes. What is read twice (nvfp4 without its global scale) counts once. "transposed" and "both" are one read, with the
scales of nvfp4 given.

    python benchmarks/casts_beat_torchao.py [--threads N] [--device cuda]
"""

import argparse
from collections.abc import Callable

import torch
from interleaved import interleave, ratio, save, spread, waiting

import parco

SHAPE = (2048, 4096)
FORMATS = ["mxfp8_e4m3", "mxfp4", "nvfp4", "fp8_e4m3:row", "int8:row", "int4:32", "nf4:64"]
BOTH = ["mxfp8_e4m3", "nvfp4"]
COPY = "copy"


def peers(x: torch.Tensor) -> dict[str, Callable[[], object]]:
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    return {
        "mxfp8_e4m3": lambda: to_mx(x, torch.float8_e4m3fn, 32),
        "mxfp4": lambda: to_mx(x, torch.float4_e2m1fn_x2, 32),
    }


def casts(x: torch.Tensor) -> dict[str, tuple[int, Callable[[], object]]]:
    """Every contender of ours: the bytes that it has to read and write, and a call of it."""
    runs: dict[str, tuple[int, Callable[[], object]]] = {}
    hadamard = parco.Hadamard(16)
    for name in FORMATS:
        encoded = parco.encode(x, name)
        moved = x.nbytes + encoded.nbytes
        runs[name] = moved, lambda name=name: parco.encode(x, name)
        runs[f"{name} stochastic"] = moved, lambda name=name: parco.encode(x, name, rounding="stochastic")
        runs[f"{name} decoded"] = moved, lambda encoded=encoded: parco.decode(encoded, x.dtype)
        if name in BOTH:
            scale = encoded.tensors.get("global_scale")
            twice = x.nbytes + 2 * encoded.nbytes
            runs[f"{name} transposed"] = (
                moved,
                lambda name=name, scale=scale: parco.encode_transposed(x, name, global_scale=scale),
            )
            for kind, transform in (("both", None), ("both, Hadamard 16", hadamard)):
                runs[f"{name} {kind}"] = (
                    twice,
                    lambda name=name, scale=scale, transform=transform: parco.encode_both(
                        x, name, global_scale=scale, transposed_scale=scale, hadamard=transform
                    ),
                )
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, object]] = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(SHAPE).to(options.device, dtype)
        copy = torch.empty_like(x)
        ours, theirs = casts(x), peers(x)
        runs: dict[str, Callable[[], object]] = {COPY: lambda x=x, copy=copy: copy.copy_(x)}
        runs |= {f"torchao {name}": run for name, run in theirs.items()}
        runs |= {name: run for name, (_, run) in ours.items()}
        if options.device == "cuda":
            runs = {name: waiting(run) for name, run in runs.items()}
        seconds = interleave(runs, options.rounds)
        copied = spread(seconds[COPY])
        speed = 2 * x.nbytes / copied["median_us"] / 1e3
        rows.append({"from": str(dtype), "to": COPY, **copied, "GB_per_s": speed})
        for name, (moved, _) in ours.items():
            found = spread(seconds[name])
            share = ratio(seconds[COPY], seconds[name]) * moved / x.nbytes
            row: dict[str, object] = {"from": str(dtype), "to": name, **found}
            row |= {"GB_per_s": moved / found["median_us"] / 1e3, "of_copy": share / 2, "of_copied_bytes": share}
            if name in theirs:
                row["times_torchao"] = ratio(seconds[f"torchao {name}"], seconds[name])
            rows.append(row)
    save(__file__, rows, options.device == "cuda")


if __name__ == "__main__":
    main()
