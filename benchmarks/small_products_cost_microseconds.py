"""Claim: a product of a small layer through torch.ops.parco costs no more than torch's own, dispatcher and checks
included.

Weights are warm, one row of bf16. `call_us` is what the dispatcher, the checks and the choice of the kernel
cost.

    python benchmarks/small_products_cost_microseconds.py
"""

import torch
from interleaved import interleave, ratio, save, spread, stored_copies

from parco.kernels import table
from parco.kernels.linear.coded import describe
from parco.kernels.linear.launches import Compiled
from parco.weights import Quantized

SHAPES = [(32, 64), (320, 320), (832, 320), (320, 832)]


def main() -> None:
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for outputs, columns in SHAPES:
        x, dense = torch.randn(1, columns).bfloat16(), torch.randn(outputs, columns).bfloat16()
        spec = Quantized("int4:32", (outputs, columns))
        ((codes, scale),) = stored_copies(spec, 1)
        call = describe(x, codes, scale, None, None, None, "int4:32", columns, outputs)
        kernel = table.choose("linear_coded", call).run
        assert isinstance(kernel, Compiled)
        launch = kernel.settle(x, codes, scale, None, "int4:32", outputs)
        runs = {
            "torch": lambda x=x, dense=dense: torch.nn.functional.linear(x, dense),
            "parco": lambda x=x, c=codes, s=scale, spec=spec: spec.apply(x, c, s),
            "launch": lambda launch=launch, x=x, c=codes, s=scale: launch(x, c, s, None, None, None, None),
        }
        with torch.inference_mode():
            seconds = interleave(runs, 60, calls=50)
        overhead = spread(seconds["parco"])["median_us"] - spread(seconds["launch"])["median_us"]
        rows.append(
            {"weights": f"{outputs}x{columns}", **spread(seconds["parco"]), "call_us": overhead}
            | {"times_torch_bf16": ratio(seconds["torch"], seconds["parco"])}
        )
    save(__file__, rows)


if __name__ == "__main__":
    main()
