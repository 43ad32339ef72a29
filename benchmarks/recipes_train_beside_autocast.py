"""Claim: every recipe trains at the speed of its products: a step of a Llama-shaped model under each of them beside the
same step under torch's own bf16 autocast, interleaved, and what the step keeps between forward and backward.

    python benchmarks/recipes_train_beside_autocast.py [--threads N] [--rounds R] [--layers L] [--recipes NAME ...]

Adam is left out: it is the same for all. Recipes that keep blocks in bf16 at the model's ends are timed without them.
"""

import argparse
import copy

import torch
from interleaved import interleave, ratio, save, spread
from transformers import LlamaConfig, LlamaForCausalLM

from parco.training import RECIPES, prepare_

SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12}


def forward(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The loss of one batch, under autocast for every recipe: what lies between the products is the same for all."""
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=tokens, labels=tokens).loss


def step(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    """Forward and backward of one batch."""
    model.zero_grad()
    forward(model, tokens).backward()


def kept_bytes(model: torch.nn.Module, tokens: torch.Tensor) -> int:
    """Bytes of what forward keeps for backward, each tensor once, parameters not counted."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(model, tokens)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found = sum(size for address, size in kept.items() if address not in parameters)
    del loss  # until here nothing that was kept could be freed and its address be used again
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = LlamaConfig(num_hidden_layers=options.layers, vocab_size=options.vocabulary, **SIZES)
    plain = LlamaForCausalLM(config).train()
    tokens = torch.randint(0, options.vocabulary, (options.sequences, options.length))
    models: dict[str, torch.nn.Module] = {"torch autocast": plain}
    for name in options.recipes:
        models[name] = copy.deepcopy(plain)
        prepare_(models[name], RECIPES[name].with_(ends=0))
    runs = {name: lambda model=model: step(model, tokens) for name, model in models.items()}
    seconds = interleave(runs, options.rounds)
    rows: list[dict[str, object]] = []
    for name, model in models.items():
        rows.append(
            {"recipe": name, "layers": options.layers, "tokens": tokens.numel()}
            | spread(seconds[name])
            | {"times_torch": ratio(seconds["torch autocast"], seconds[name])}
            | {"kept_mb": round(kept_bytes(model, tokens) / 1e6)}
        )
    save(__file__, rows)


if __name__ == "__main__":
    main()
