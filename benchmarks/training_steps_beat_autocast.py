"""Claim: a training step of a Llama-shaped model (forward and backward; by default 109 M parameters, vocabulary 32,000,
8 sequences of 512) takes less time and memory with parco's bf16 products, fused loss, norms, gates and rotations than
under PyTorch's bf16 autocast, on the same fp32 parameters.

    python benchmarks/training_steps_beat_autocast.py [--threads N] [--rounds R] [--layers L] [--sequences B]

Interleaved in one process; memory is what a step of each adds at its peak to the resident set, in a process of its own.
"""

import argparse
import copy
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from interleaved import interleave, ratio, save, spread
from transformers import LlamaConfig, LlamaForCausalLM

import parco
from parco.training import fuse_loss_, prepare_

SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12}
NAMES = ("torch autocast", "parco")


def make(name: str, plain: torch.nn.Module) -> torch.nn.Module:
    """The model that a step of `name` trains."""
    if name == "parco":
        prepare_(plain, "bf16")
        parco.fuse_(plain)
        fuse_loss_(plain)
    return plain


def step(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    """Forward and backward of one batch."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak_of(model: torch.nn.Module, tokens: torch.Tensor) -> int:
    """Bytes that two steps add at their peak, gradients included, looked at every millisecond."""
    start = highest = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(2):
        step(model, tokens)
    done.set()
    watcher.join()
    return highest - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--memory", choices=NAMES, help="only print the bytes that steps of this one add")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = LlamaConfig(
        num_hidden_layers=options.layers, vocab_size=options.vocabulary, tie_word_embeddings=True, **SIZES
    )
    plain = LlamaForCausalLM(config).train()
    tokens = torch.randint(0, options.vocabulary, (options.sequences, options.length))
    if options.memory:
        print(peak_of(make(options.memory, plain), tokens))
        return
    models = {name: make(name, copy.deepcopy(plain)) for name in NAMES}
    seconds = interleave(
        {name: lambda model=model: step(model, tokens) for name, model in models.items()}, options.rounds
    )
    rows: list[dict[str, object]] = []
    for name in NAMES:
        again = [sys.executable, __file__, *sys.argv[1:], "--memory", name]
        peak = json.loads(subprocess.run(again, check=True, capture_output=True, text=True).stdout)
        rows.append(
            {"model": name, "layers": options.layers, "tokens": tokens.numel()}
            | spread(seconds[name])
            | {"tokens_per_second": round(tokens.numel() / sorted(seconds[name])[len(seconds[name]) // 2], 1)}
            | {"times_torch": ratio(seconds["torch autocast"], seconds[name]), "peak_mb": round(peak / 1e6)}
        )
    save(__file__, rows)


if __name__ == "__main__":
    main()
