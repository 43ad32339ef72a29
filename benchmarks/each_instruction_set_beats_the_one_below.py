"""Claim: every level of instruction set that a machine has, from avx2 on, multiplies by stored weights faster than the
one below it: avx512 1.4 to 2.4 times as fast as avx2 (one row of int8 or ternary, which memory limits, 1.2), on one
thread of a Xeon of the Skylake generation. That machine has no level above avx512, so these two are what was measured.

Each level's own kernel is called, on the same packed weights, in turn; plain C++ (generic) is left out. `times_below`
compares a level with the one below; `times_torch_bf16` with torch's product of dense bf16, from memory as ours.

    python benchmarks/each_instruction_set_beats_the_one_below.py [--threads N] [--size N]
"""

import argparse

import torch
from interleaved import interleave, ratio, save, spread, stored_copies

from parco import machine
from parco.kernels import table
from parco.kernels.linear.coded import CodedCall
from parco.weights import Quantized

FORMATS = ["int8:row", "int4:32", "ternary", "nvfp4", "mxfp4", "fp8_e4m3:row", "mxfp8_e4m3", "fp6_e3m2", "nf4:64"]
ROWS = [1, 8, 64, 512]
BYTES = 160 << 20
"""Of weights that are gone through before one is read again."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size, dtype = options.size, torch.bfloat16
    levels = [isa for isa in machine.detect().isas if isa != "generic"]
    rows: list[dict[str, object]] = []
    dense = [torch.randn(size, size).to(dtype) for _ in range(BYTES // (2 * size * size))]
    for name in FORMATS:
        spec = Quantized(name, (size, size))
        copies = stored_copies(spec, max(1, BYTES // sum(t.nbytes for t in stored_copies(spec, 1)[0])))
        named = [dict(zip(spec.tensors(), tensors, strict=True)) for tensors in copies]
        given = [tuple(each.get(part) for part in ("codes", "scale", "zero", "global_scale")) for each in named]
        for count in ROWS:
            x, turn = torch.randn(count, size).to(dtype), iter(range(1 << 60))
            runs = {"torch bf16": lambda x=x, turn=turn: torch.nn.functional.linear(x, dense[next(turn) % len(dense)])}
            kernels = {"torch bf16": ""}
            for isa in levels:
                call = CodedCall("cpu", isa, dtype, count, size, size, name, True)
                kernel = table.choose("linear_coded", call)
                if kernel.isa != isa:
                    continue
                kernels[isa] = kernel.name

                def run(x=x, turn=turn, run=kernel.run, given=given, name=name) -> torch.Tensor:
                    return run(x, *given[next(turn) % len(given)], None, name, size, size)

                runs[isa] = run
            with torch.inference_mode():
                seconds = interleave(runs, options.rounds, calls=max(1, 32 // count))
            below = None
            for isa, own in seconds.items():
                row = {"format": name, "rows": count, "level": isa, "kernel": kernels[isa], **spread(own)}
                row["times_torch_bf16"] = ratio(seconds["torch bf16"], own)
                if below is not None:
                    row["times_below"] = ratio(seconds[below], own)
                below = isa if isa in levels else None
                rows.append(row)
    save(__file__, rows)


if __name__ == "__main__":
    main()
