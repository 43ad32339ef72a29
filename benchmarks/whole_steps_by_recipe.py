"""Claim: on a model of a Llama's shape (by default 109 M parameters, vocabulary 32,000, 8 sequences of 512, fp32
weights and AdamW) a whole step by `bf16` gives 1.8 times the tokens per second of PyTorch's bf16 autocast, `int8` 1.15
times those of our `bf16`, and `mxfp8`, `fp8-current` and `nvfp4` take at most 1.35, 1.35 and 1.6 times its time.

    python benchmarks/whole_steps_by_recipe.py [--threads N] [--rounds R] [--layers L] [--recipes NAME ...]

Interleaved in one process: forward, backward, clipping and AdamW, of PyTorch (fused) beside its own model, of parco
beside the others, which have fused losses, norms, gates and rotations as `parco train` has. All models share their
weights and gradients, so memory is that of one. What a step keeps between forward and backward is printed too.
"""

import argparse
import copy
from collections.abc import Callable

import torch
from interleaved import interleave, ratio, save, spread
from recipes_train_beside_autocast import SIZES, kept_bytes
from transformers import LlamaConfig, LlamaForCausalLM

import parco
from parco.training import RECIPES, AdamW, fuse_loss_, prepare_

PLAIN = "torch autocast"


def twin(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the modules on the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> None:
    """Forward, backward and update of one batch."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--warm", type=int, default=1, help="rounds that are not counted")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--recipes", nargs="+", choices=list(RECIPES), metavar="NAME",
        default=["bf16", "int8", "mxfp8", "fp8-current", "nvfp4"],
    )  # fmt: skip
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=options.layers, vocab_size=options.vocabulary, tie_word_embeddings=True, **SIZES
    )
    plain = LlamaForCausalLM(config).train()
    tokens = torch.randint(0, options.vocabulary, (options.sequences, options.length))
    models = {PLAIN: plain}
    for name in options.recipes:
        models[name] = twin(plain)
        prepare_(models[name], name)
        parco.fuse_(models[name])
        fuse_loss_(models[name])
    theirs = torch.optim.AdamW(plain.parameters(), 1e-4, fused=True)
    ours = AdamW(plain.parameters(), 1e-4)
    runs: dict[str, Callable[[], None]] = {
        name: lambda name=name, model=model: step(model, theirs if name == PLAIN else ours, tokens)
        for name, model in models.items()
    }
    seconds = interleave(runs, options.rounds, warm=options.warm)
    rows: list[dict[str, object]] = []
    for name, model in models.items():
        own = {"step": name, "layers": options.layers, "tokens": tokens.numel(), "rounds": options.rounds}
        own |= spread(seconds[name])
        own["tokens_per_second"] = round(tokens.numel() / (own["median_us"] / 1e6), 1)
        own["times_torch"] = ratio(seconds[PLAIN], seconds[name])
        if "bf16" in seconds and name != PLAIN:
            own["time_of_bf16"] = 1 / ratio(seconds["bf16"], seconds[name])
        rows.append(own | {"kept_mb": round(kept_bytes(model, tokens) / 1e6)})
    save(__file__, rows)


if __name__ == "__main__":
    main()
