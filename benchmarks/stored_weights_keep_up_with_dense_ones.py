"""Claim: many rows times stored weights take little longer than times parco's own dense bf16 weights: at 512 rows at
most 1.1 times, at 64 at most 1.25 times with weights in the cache and 0.75 times with weights from memory.

Weights are warm (the same ones in every call) or cold (each call takes the next of enough copies to fill `--cold` MB).
`of_dense` is the time of a format over that of the dense product beside it, `of_torch` that of torch's bf16 product.

    python benchmarks/stored_weights_keep_up_with_dense_ones.py [--threads N] [--rounds R] [--cold MB]
"""

import argparse
from collections.abc import Callable
from itertools import count

import torch
from interleaved import interleave, ratio, save, spread, stored_copies

from parco.weights import Dense, Quantized, Weight

SHAPE = (4096, 4096)
FORMATS = ["fp8_e4m3:row", "mxfp8_e4m3", "mxfp4", "nvfp4", "int4:32", "int8:row", "nf4:64"]


def contenders(spec: Weight, x: torch.Tensor, cold: int) -> dict[str, Callable[[], torch.Tensor]]:
    """The products of a stored matrix, of dense bf16 weights and of torch's own, each with `cold` bytes of weights."""
    turn = count()
    dense = Dense(SHAPE, "bf16")
    stored, plain = (stored_copies(each, cold // each.nbytes + 1) for each in (spec, dense))
    return {
        "ours": lambda: spec.apply(x, *stored[next(turn) % len(stored)]),
        "dense": lambda: dense.apply(x, *plain[next(turn) % len(plain)]),
        "torch": lambda: torch.nn.functional.linear(x, plain[next(turn) % len(plain)][0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cold", type=int, default=1500)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, object]] = []
    for tokens, cold in ((512, 0), (64, 0), (64, options.cold), (16, 0), (16, options.cold)):
        x = torch.randn(tokens, SHAPE[1]).bfloat16()
        for name in FORMATS:
            with torch.inference_mode():
                seconds = interleave(contenders(Quantized(name, SHAPE), x, cold << 20), options.rounds)
            rows.append(
                {"rows": tokens, "cold_MB": cold, "format": name, **spread(seconds["ours"])}
                | {"of_dense": 1 / ratio(seconds["dense"], seconds["ours"])}
                | {"of_torch": 1 / ratio(seconds["torch"], seconds["ours"])}
                | {"dense_of_torch": 1 / ratio(seconds["torch"], seconds["dense"])}
            )
    save(__file__, rows)


if __name__ == "__main__":
    main()
