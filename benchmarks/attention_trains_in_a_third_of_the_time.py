"""Claim: causal attention of bf16 operands, forward and backward, takes at most a third of the time of PyTorch's where
the processor has no tiles that multiply bf16 (half of it over 2,048 tokens of heads of 128), and less
than PyTorch's takes on the same operands widened to fp32. Sums are in fp32, and their share of its peak is printed.

    python benchmarks/attention_trains_in_a_third_of_the_time.py [--threads N] [--rounds R]

Shapes: the model that ships with parco, a Llama of 109 M parameters (also with four examples packed in each sequence,
and with a tenth of the softmax dropped), heads of 128 in groups over a longer sequence, one short sequence. `forward`
is without gradients. Widening and rounding of the fp32 operands is not counted.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from interleaved import interleave, ratio, save, spread
from torch.nn.functional import scaled_dot_product_attention

from parco import machine
from parco.kernels.attention import attention

CAUSAL, PACKED, DROPPED = "causal", "packed", "dropped"
EXAMPLES = 4
"""In a packed sequence."""

SHAPES = [
    (16, 5, 1, 512, 64, CAUSAL),
    (8, 12, 12, 512, 64, CAUSAL),
    (8, 12, 12, 512, 64, PACKED),
    (8, 12, 12, 512, 64, DROPPED),
    (1, 16, 4, 2048, 128, CAUSAL),
    (1, 12, 12, 128, 64, CAUSAL),
]
"""Sequences, heads, heads of keys, tokens, numbers of a head, and what else there is."""


def contenders(kind: str, tokens: int) -> dict[str, Callable[..., torch.Tensor]]:
    """Each library's attention."""
    if kind == PACKED:
        example = torch.arange(tokens) // (tokens // EXAMPLES)
        mask = (example[:, None] == example).tril()[None, None]
        theirs, ours = {"attn_mask": mask}, {"mask": mask}
    elif kind == DROPPED:
        theirs, ours = {"is_causal": True, "dropout_p": 0.1}, {"causal": True, "seed": torch.tensor([1]), "p": 0.1}
    else:
        theirs, ours = {"is_causal": True}, {"causal": True}
    torchs = partial(scaled_dot_product_attention, enable_gqa=True, **theirs)
    return {"torch bf16": torchs, "torch fp32": torchs, "parco": partial(attention, **ours)}


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
    peak = 2 * machine.peaks().multiply_adds("fp32")
    rows: list[dict[str, object]] = []
    for sequences, heads, key_heads, tokens, width, kind in SHAPES:
        sizes = ((heads, True), (key_heads, True), (key_heads, True), (heads, False))
        made = [
            torch.randn(sequences, tokens, count, width).bfloat16().transpose(1, 2).requires_grad_(leaf)
            for count, leaf in sizes
        ]
        wide = [each.detach().float().requires_grad_(each.requires_grad) for each in made]
        runs: dict[str, Callable[[], object]] = {}
        for name, attend in contenders(kind, tokens).items():
            *operands, grad = wide if name == "torch fp32" else made
            runs[f"{name}: forward"] = partial(forward, attend, *operands)
            runs[f"{name}: forward and backward"] = partial(both, attend, grad, *operands)
        seconds = interleave(runs, options.rounds)
        longest = tokens // EXAMPLES if kind == PACKED else tokens
        products = 4 * sequences * heads * tokens * (longest + 1) / 2 * width  # of keys a query sees, 2 of them
        for name, own in seconds.items():
            contender, _, what = name.partition(": ")
            found = spread(own)
            count = products * (1 if what == "forward" else 3.5)
            rows.append(
                {"sequences": sequences, "heads": heads, "key_heads": key_heads, "tokens": tokens, "width": width}
                | {"kind": kind, "attention": contender, "what": what}
                | found
                | {"GFLOP_per_s": count / found["median_us"] / 1e3}
                | {"of_fp32_peak": count / found["median_us"] * 1e6 / peak}
                | {"times_torch_bf16": ratio(seconds[f"torch bf16: {what}"], own)}
            )
    save(__file__, rows)


if __name__ == "__main__":
    main()
