"""Claim: `parco.fuse_` makes a model decode faster through Transformers; fused, a 1.1 B model decodes at three quarters
or more of what its bytes and a plain read of as many allow.

The same weights, in bf16 as PyTorch holds them or in int4, the head's too where it has its own, twice: as Transformers
runs them, and fused. Steps of decoding (batch 1), tokens of `generate` and prompts of 512 tokens (or as many as the
model takes), and a plain read of the bytes that a token takes, in turn; lower quartiles, and the median and quartiles
of how many times faster a round's steps are.

    python benchmarks/fused_models_decode_faster.py [--threads N] [--rounds R] [--only NAME] [--stored bf16|int4:32]
"""

import argparse
import copy
import time
from collections.abc import Callable
from statistics import quantiles

import torch
from interleaved import save
from transformers import AutoConfig, AutoModelForCausalLM

import parco
from parco import hub
from parco.fitting.measure import decode_seconds, lower_quartile, prefill_seconds
from parco.nn.parts import is_linear
from parco.nn.sites import EXPERT_PARAMETERS, is_experts

COMMON = {"vocab_size": 32000, "max_position_embeddings": 2048}
SMALL = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
GEMMA = {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 2048}
SHAPES = {
    "Llama 106M": ("llama", {**SMALL, "intermediate_size": 2048}),
    "Llama 1.1B": (
        "llama",
        {
            "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
            "num_key_value_heads": 4,
        },
    ),
    "Qwen3 MoE 1.5B, 0.6B of it a token": (
        "qwen3_moe",
        {
            "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 32,
            "num_key_value_heads": 4, "head_dim": 128, "num_experts": 32, "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
    ),
    "NeoX 134M": ("gpt_neox", {**SMALL, "intermediate_size": 3072}),
    "Phi 134M": ("phi", {**SMALL, "intermediate_size": 3072}),
    "Gemma 2 116M": ("gemma2", GEMMA),
    "Gemma 3 116M": ("gemma3_text", GEMMA),
}  # fmt: skip
TOKENS = 16
STORED = ("bf16", "int4:32")


def made(config: AutoConfig) -> torch.nn.Module:
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "embedded 10M": lambda: hub.load(hub.embedded_path()).model,
    **{
        name: lambda kind=kind, shape=shape: made(AutoConfig.for_model(kind, **COMMON, **shape))
        for name, (kind, shape) in SHAPES.items()
    },
    "GPT-2 124M": lambda: made(AutoConfig.for_model("gpt2", n_positions=2048)),
}


def bytes_of_a_token(model: torch.nn.Module) -> int:
    """Bytes of the matrices that a token is multiplied by: of experts a share."""
    always = sum(module.weight.nbytes for module in model.modules() if is_linear(module))
    for module in model.modules():
        if is_experts(module):
            held = [getattr(module, name) for name in EXPERT_PARAMETERS]
            size = sum(matrix.nbytes for stack in held for matrix in stack)
            always += size * model.config.num_experts_per_tok // module.num_experts
    return always


def generate_seconds(model: torch.nn.Module) -> float:
    """Seconds of one more token of `generate`."""
    ids = torch.randint(3, 256, (1, 32), generator=torch.Generator().manual_seed(3))
    seconds = []
    for count in (1, 1 + TOKENS):
        began = time.perf_counter()
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        seconds.append(time.perf_counter() - began)
    return (seconds[1] - seconds[0]) / TOKENS


def measure(model: torch.nn.Module, stored: str, rounds: int) -> dict[str, object]:
    if stored == "bf16":
        model.bfloat16()
    else:
        parco.convert_(model, stored)
        if not model.config.tie_word_embeddings:
            parco.convert_(model, stored, lambda module, name: name == "lm_head")
    fused = copy.deepcopy(model)
    parco.fuse_(fused)
    prompt = min(512, model.config.max_position_embeddings)
    size = bytes_of_a_token(model)
    buffer = torch.ones(size // 8, dtype=torch.int64)

    def read() -> float:
        began = time.perf_counter()
        buffer.sum()
        return time.perf_counter() - began

    runs: dict[str, Callable[[], float]] = {"read": read}
    for kind, each in (("plain", model), ("fused", fused)):
        runs[f"{kind}_decode"] = lambda each=each: decode_seconds(each)
        runs[f"{kind}_generate"] = lambda each=each: generate_seconds(each)
        runs[f"{kind}_prefill"] = lambda each=each: prefill_seconds(each, prompt)
    seen: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            seconds = run()
            if turn:
                seen[name].append(seconds)
    found = {name: lower_quartile(values) for name, values in seen.items()}
    row: dict[str, object] = {"prompt": prompt, "megabytes": size / 1e6}
    row |= {f"{name}_ms": seconds * 1e3 for name, seconds in found.items()}
    for what in ("decode", "generate", "prefill"):
        row[f"{what}_times"] = found[f"plain_{what}"] / found[f"fused_{what}"]
        of_rounds = [a / b for a, b in zip(seen[f"plain_{what}"], seen[f"fused_{what}"], strict=True)]
        for name, value in zip(("low", "median", "high"), quantiles(of_rounds, n=4, method="inclusive"), strict=True):
            row[f"{what}_times_{name}"] = value
    for kind in ("plain", "fused"):
        row[f"{kind}_tokens_per_second"] = 1 / found[f"{kind}_decode"]
    for what in ("plain_decode", "plain_generate", "fused_decode", "fused_generate"):
        row[f"{what}_of_a_read"] = found["read"] / found[what]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=list(MODELS))
    parser.add_argument("--stored", choices=STORED)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = [options.only] if options.only else list(MODELS)
    formats = [options.stored] if options.stored else STORED
    rows = [
        {"model": name, "stored": stored} | measure(MODELS[name](), stored, options.rounds)
        for name in names
        for stored in formats
    ]
    save(__file__, rows)


if __name__ == "__main__":
    main()
