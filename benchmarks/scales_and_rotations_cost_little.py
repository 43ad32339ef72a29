"""Claim: a matrix under a scale takes hardly longer than the matrix itself, and a rotated one little longer.

`over plain` is the time of the product with the scaled or rotated matrix over that of the product beside it with the
same one unscaled; bf16 inputs, weights cold: each call takes the next of enough copies to fill `--cold` MB. Medians
over the rounds.

    python benchmarks/scales_and_rotations_cost_little.py [--threads N] [--rows 1,512] [--sizes 1024,4096] [--cold MB]
"""

import argparse
from itertools import count

import torch
from interleaved import interleave, ratio, save, spread, stored_copies

from parco.weights import Dense, Quantized, Rotated, Scaled

FORMATS = ("int8:row", "int4:64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--rows", default="1,512")
    parser.add_argument("--sizes", default="1024,4096")
    parser.add_argument("--cold", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: list[dict[str, object]] = []
    for size in map(int, options.sizes.split(",")):
        for form in FORMATS:
            plain = Quantized(form, (size, size))
            stored = stored_copies(plain, (options.cold << 20) // plain.nbytes + 1)
            scale = torch.rand(1, size).add_(0.5).bfloat16()
            scaled, rotated, turn = Scaled(plain, Dense((1, size), "bf16")), Rotated(plain), count()

            def own(stored=stored, turn=turn) -> tuple[torch.Tensor, ...]:
                return stored[next(turn) % len(stored)]

            for rows in map(int, options.rows.split(",")):
                x = torch.randn(rows, size).bfloat16()
                runs = {
                    "plain": lambda x=x, plain=plain, own=own: plain.apply(x, *own()),
                    "scaled": lambda x=x, scaled=scaled, own=own, scale=scale: scaled.apply(x, *own(), scale),
                    "rotated": lambda x=x, rotated=rotated, own=own: rotated.apply(x, *own()),
                }
                with torch.inference_mode():
                    seconds = interleave(runs, options.rounds, calls=20 if rows == 1 else 1)
                for name, values in seconds.items():
                    found.append({
                        "size": size, "format": form, "rows": rows, "weight": name, **spread(values),
                        "over_plain": 1 / ratio(seconds["plain"], values),
                    })  # fmt: skip
    save(__file__, found)


if __name__ == "__main__":
    main()
