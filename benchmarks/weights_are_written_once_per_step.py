"""Claim: under gradient accumulation `parco.training.once_per_step` saves each pass the casts of the weights: a step of
few tokens a pass takes less time by nvfp4, int8 and bitnet, with the same numbers.

    python benchmarks/weights_are_written_once_per_step.py [--threads N] [--rounds R] [--tokens T ...] [--passes P]

Blocks of a Llama of 109 M parameters (12 layers of width 768), fused, without embeddings and head: passes forward and
backward of T tokens each, then AdamW, in turn with and without it. `kept_mb` is what it holds until the step.
"""

import argparse
import contextlib
from collections.abc import Callable

import torch
from interleaved import interleave, ratio, save, spread
from recipes_train_beside_autocast import SIZES
from transformers import LlamaConfig, LlamaModel

import parco
from parco.training import RECIPES, AdamW, once_per_step, prepare_
from parco.training.once import STORE


def kept_bytes() -> int:
    """Bytes that are held of weights in few bits."""
    return sum(tensor.nbytes for kept in STORE.kept.values() for tensor in kept.written.tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument(
        "--recipes", nargs="+", choices=list(RECIPES), metavar="NAME",
        default=["bf16", "fp8-current", "mxfp8", "nvfp4", "int8", "bitnet"],
    )  # fmt: skip
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(num_hidden_layers=options.layers, vocab_size=8, **SIZES)).train()
    parco.fuse_(model)
    optimizer = AdamW(model.parameters(), 1e-4)
    held: dict[str, int] = {}

    def step(recipe: str, count: int, once: bool) -> None:
        prepare_(model, recipe)
        with once_per_step() if once else contextlib.nullcontext():
            for _ in range(options.passes):
                x = torch.randn(1, count, model.config.hidden_size)
                with torch.autocast("cpu", torch.bfloat16):
                    y = model(inputs_embeds=x, use_cache=False).last_hidden_state
                y.square().mean().backward()
            held[recipe] = kept_bytes()
            optimizer.step()
        optimizer.zero_grad()

    rows: list[dict[str, object]] = []
    for count in options.tokens:
        for recipe in options.recipes:
            runs: dict[str, Callable[[], None]] = {
                name: lambda recipe=recipe, count=count, once=once: step(recipe, count, once)
                for name, once in (("each pass", False), ("once", True))
            }
            seconds = interleave(runs, options.rounds, warm=1)
            own = {"recipe": recipe, "tokens": count, "passes": options.passes, **spread(seconds["once"])}
            rows.append(own | {"times_each_pass": ratio(seconds["each pass"], seconds["once"])})
            rows[-1]["kept_mb"] = round(held[recipe] / 1e6)
    save(__file__, rows)


if __name__ == "__main__":
    main()
