"""Claim: `parco.fuse_` makes a model decode faster through Transformers, the more the smaller its matrices are.

The same weights, int4, twice: as Transformers runs them, and fused. Steps of decoding (batch 1) and prompts of 512
tokens (or as many as the model takes) in turn; lower quartiles.

    python benchmarks/fused_models_decode_faster.py [--threads N] [--rounds R]
"""

import argparse
import copy

import torch
from interleaved import save
from transformers import AutoConfig, AutoModelForCausalLM

import parco
from parco import hub
from parco.fitting.measure import interleaved

LLAMA = {"vocab_size": 32000, "max_position_embeddings": 2048}
SHAPES = {
    "Llama 106M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "Llama 1.1B": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}  # fmt: skip


def models() -> dict[str, torch.nn.Module]:
    found = {"embedded 10M": hub.load(hub.embedded_path()).model}
    for name, shape in SHAPES.items():
        config = AutoConfig.for_model("llama", **LLAMA, **shape)
        found[name] = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    gpt2 = AutoConfig.for_model("gpt2", n_positions=2048)
    found["GPT-2 124M"] = AutoModelForCausalLM.from_config(gpt2, dtype=torch.bfloat16).eval()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, object]] = []
    for name, model in models().items():
        tokens = min(512, model.config.max_position_embeddings)
        parco.convert_(model, "int4:32")
        fused = copy.deepcopy(model)
        parco.fuse_(fused)
        found = interleaved({"plain": model, "fused": fused}, tokens, options.rounds)
        rows.append(
            {"model": name, "prompt": tokens}
            | {
                f"{kind}_{what}_ms": found[kind][i] * 1e3
                for kind in found
                for i, what in enumerate(("decode", "prefill"))
            }
            | {f"{what}_times": found["plain"][i] / found["fused"][i] for i, what in enumerate(("decode", "prefill"))}
        )
    save(__file__, rows)


if __name__ == "__main__":
    main()
