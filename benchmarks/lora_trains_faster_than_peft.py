"""Claim: LoRA trains at least 1.3 times as many tokens per second as PEFT in bf16, at no more memory.

    python benchmarks/lora_trains_faster_than_peft.py [--layers N] [--rounds N] [--threads N]

Rank 16 on all linear layers of the blocks of a Llama of 100 million parameters with new weights, 4 sequences of 512
tokens, AdamW. PEFT trains with the base in bf16, and under autocast with it in fp32. Each contender lives in a process
of its own, so that its memory can be told; they take steps in turn. Memory is the greatest resident size above that
after the imports and before the model.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

from interleaved import ratio, save

SEQUENCES, WINDOW, VOCABULARY = 4, 512, 32000


def resident() -> float:
    """Megabytes at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def contend(name: str, layers: int, threads: int, line: Connection) -> None:
    """Takes a step whenever it is told to, and answers with its seconds; at the end with memory and loss."""
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import parco
    from parco import adapters
    from parco.training import fuse_loss_

    torch.set_num_threads(threads)
    before = resident()
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **sizes))
    if name != "peft autocast":
        model.to(torch.bfloat16)
    if name == "parco":
        parco.fuse_(model)
        fuse_loss_(model)
        adapters.add_(model, "lora(16)")
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    model.train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    tokens = torch.randint(VOCABULARY, (SEQUENCES, WINDOW), generator=torch.Generator().manual_seed(0))
    loss = 0.0
    line.send(sum(each.numel() for each in model.parameters()))
    while line.recv():
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "peft autocast"):
            found = model(input_ids=tokens, labels=tokens).loss
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = found.item()
        line.send(time.perf_counter() - begin)
    line.send((resident() - before, loss))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    lines: dict[str, Connection] = {}
    for name in ("peft bf16", "peft autocast", "parco"):
        lines[name], other = context.Pipe()
        context.Process(target=contend, args=(name, options.layers, options.threads, other), daemon=True).start()
    parameters = {name: line.recv() for name, line in lines.items()}
    seconds: dict[str, list[float]] = {name: [] for name in lines}
    for turn in range(options.rounds + 1):
        for name, line in lines.items():
            line.send(True)
            taken = line.recv()
            if turn:
                seconds[name].append(taken)
    rows: list[dict[str, object]] = []
    for name, line in lines.items():
        line.send(False)
        memory, loss = line.recv()
        rows.append(
            {
                "contender": name,
                "layers": options.layers,
                "parameters": parameters[name],
                "tokens_per_second": SEQUENCES * WINDOW / statistics.median(seconds[name]),
                "slowest_s": max(seconds[name]),
                "fastest_s": min(seconds[name]),
                "parco_times_faster": ratio(seconds[name], seconds["parco"]),
                "memory_mb": memory,
                "loss": loss,
            }
        )
    save(__file__, rows)


if __name__ == "__main__":
    main()
