"""Claim: a product of a small layer through torch.ops.parco costs no more than torch's own, dispatcher and checks
included.

Weights are warm, one row of bf16. `call_us` is what is left when the compiled kernel alone is taken away.

    python benchmarks/small_products_cost_microseconds.py
"""

import torch
from interleaved import interleave, random_codes, ratio, save, spread

from parco import _C, machine
from parco.kernels.linear import linear_int

SHAPES = [(32, 64), (320, 320), (832, 320), (320, 832)]


def main() -> None:
    torch.set_num_threads(1)
    kernel = getattr(_C, f"linear_int_{'avx512' if machine.isa() == 'amx' else machine.isa()}")
    rows: list[dict[str, object]] = []
    for outputs, columns in SHAPES:
        x, dense = torch.randn(1, columns).bfloat16(), torch.randn(outputs, columns).bfloat16()
        ((codes, scale),) = random_codes((outputs, columns), 4, 32, 1)
        y = torch.empty(1, outputs, dtype=torch.bfloat16)
        addresses = (x.data_ptr(), codes.data_ptr(), scale.data_ptr(), 0, 0, y.data_ptr())
        numbers = (1, outputs, columns, 32, columns // 32, 4, 1, 1, 0, 1)
        runs = {
            "torch": lambda x=x, dense=dense: torch.nn.functional.linear(x, dense),
            "parco": lambda x=x, c=codes, s=scale, k=columns: linear_int(x, c, s, None, None, 4, 32, k),
            "kernel": lambda a=addresses, n=numbers: kernel(*a, *n),
        }
        with torch.inference_mode():
            seconds = interleave(runs, 60, calls=50)
        call = spread(seconds["parco"])["median_us"] - spread(seconds["kernel"])["median_us"]
        rows.append(
            {"weights": f"{outputs}x{columns}", **spread(seconds["parco"]), "call_us": call}
            | {"times_torch_bf16": ratio(seconds["torch"], seconds["parco"])}
        )
    save(__file__, rows)


if __name__ == "__main__":
    main()
