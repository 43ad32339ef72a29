"""Claim: one or two rows of bf16 times cold bf16 weights run faster through linear_dense than through torch, four
about as fast.

python benchmarks/dense_decode_beats_torch_bf16.py [--threads N]
"""

import argparse
from itertools import count

import torch
from interleaved import interleave, ratio, save, spread

from parco.kernels.linear import linear_dense

SHAPES = [(832, 320), (2048, 2048), (5632, 2048)]
COLD = 300 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, object]] = []
    for outputs, columns in SHAPES:
        dense = [torch.randn(outputs, columns).bfloat16() for _ in range(min(200, COLD // (2 * outputs * columns) + 1))]
        for height in (1, 2, 4):
            x = torch.randn(height, columns).bfloat16()
            turn = count()

            def ours(x=x, dense=dense, turn=turn) -> torch.Tensor:
                return linear_dense(x, dense[next(turn) % len(dense)])

            def theirs(x=x, dense=dense, turn=turn) -> torch.Tensor:
                return torch.nn.functional.linear(x, dense[next(turn) % len(dense)])

            with torch.inference_mode():
                seconds = interleave({"parco": ours, "torch": theirs}, options.rounds)
            rows.append(
                {"rows": height, "weights": f"{outputs}x{columns}", **spread(seconds["parco"])}
                | {"GB_per_s": 2e-9 * outputs * columns / (spread(seconds["parco"])["median_us"] * 1e-6)}
                | {"times_torch_bf16": ratio(seconds["torch"], seconds["parco"])}
            )
    save(__file__, rows)


if __name__ == "__main__":
    main()
