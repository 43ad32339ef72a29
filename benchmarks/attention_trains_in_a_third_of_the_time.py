"""Claim: causal attention of bf16 operands, forward and backward, takes at most a third of the time of PyTorch's where
the processor has no tiles that multiply bf16 (half of it over 2,048 tokens of heads of 128), and less
than PyTorch's takes on the same operands widened to fp32.

    python benchmarks/attention_trains_in_a_third_of_the_time.py [--threads N] [--rounds R]

Shapes: the model that ships with parco, a Llama of 109 M parameters, heads of 128 in groups over a longer sequence, one
short sequence. `forward` is without gradients. Widening and rounding of the fp32 operands is not counted.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from interleaved import interleave, ratio, save, spread
from torch.nn.functional import scaled_dot_product_attention

from parco.kernels.attention import attention

SHAPES = [(16, 5, 1, 512, 64), (8, 12, 12, 512, 64), (1, 16, 4, 2048, 128), (1, 12, 12, 128, 64)]
"""Sequences, heads, heads of keys, tokens, numbers of a head."""


CONTENDERS: dict[str, Callable[..., torch.Tensor]] = {
    "torch bf16": partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True),
    "torch fp32": partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True),
    "parco": partial(attention, causal=True),
}


def forward(attend: Callable[..., torch.Tensor], *operands: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return attend(*operands)


def both(attend: Callable[..., torch.Tensor], grad: torch.Tensor, *operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(attend(*operands), operands, grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, object]] = []
    for sequences, heads, key_heads, tokens, width in SHAPES:
        sizes = ((heads, True), (key_heads, True), (key_heads, True), (heads, False))
        made = [
            torch.randn(sequences, tokens, count, width).bfloat16().transpose(1, 2).requires_grad_(leaf)
            for count, leaf in sizes
        ]
        wide = [each.detach().float().requires_grad_(each.requires_grad) for each in made]
        runs: dict[str, Callable[[], object]] = {}
        for name, attend in CONTENDERS.items():
            *operands, grad = wide if name == "torch fp32" else made
            runs[f"{name}: forward"] = partial(forward, attend, *operands)
            runs[f"{name}: forward and backward"] = partial(both, attend, grad, *operands)
        seconds = interleave(runs, options.rounds)
        products = 4 * sequences * heads * tokens * (tokens + 1) / 2 * width  # of keys a query sees, 2 of them
        for name, own in seconds.items():
            contender, _, what = name.partition(": ")
            found = spread(own)
            count = products * (1 if what == "forward" else 3.5)
            rows.append(
                {"sequences": sequences, "heads": heads, "key_heads": key_heads, "tokens": tokens, "width": width}
                | {"attention": contender, "what": what}
                | found
                | {"GFLOP_per_s": count / found["median_us"] / 1e3}
                | {"times_torch_bf16": ratio(seconds[f"torch bf16: {what}"], own)}
            )
    save(__file__, rows)


if __name__ == "__main__":
    main()
