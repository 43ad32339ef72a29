"""LoRA of rank 16 on all linear layers of the blocks of a Llama with new weights, by parco and by PEFT: each contender
in a process of its own, so that its memory can be told, and all of them in turn.

Memory is the greatest resident size above that after the imports and before the model. After each step, in its time,
everyone gives freed memory back to the system (`machine.release_memory`), as `parco tune` does.
"""

import multiprocessing
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

VOCABULARY = 32000


@dataclass(frozen=True)
class Shape:
    """Of a Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int


SMALL = Shape(768, 2048, 12, 12, 12)
"""100 million parameters."""
LARGE = Shape(2048, 5632, 22, 32, 4)
"""1.1 billion, as TinyLlama."""


@dataclass(frozen=True)
class Contender:
    """`library` is parco or peft; `base` bf16, of parco also a format of few bits; with `autocast` it is fp32 and
    multiplied in bf16. Tokens are drawn anew for each step: some hundred words, the frequent ones far more often.
    """

    library: str
    shape: Shape
    sequences: int
    window: int
    base: str = "bf16"
    autocast: bool = False
    seed: int = 0
    threads: int = 2


def resident() -> float:
    """Megabytes at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bare(contender: Contender, llama: Any) -> Any:
    """The model without adapters, of Transformers' module `llama`. Over few bits each layer is stored so before another
    is made.
    """
    import torch

    from parco import convert_

    shape = contender.shape
    stored = contender.base != "bf16"
    config = llama.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=0 if stored else shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
    )  # fmt: skip
    torch.manual_seed(contender.seed)
    torch.set_default_dtype(torch.float32 if contender.autocast else torch.bfloat16)
    model: Any = llama.LlamaForCausalLM(config)
    if stored:
        for index in range(shape.layers):
            layer = llama.LlamaDecoderLayer(config, index)
            convert_(layer, contender.base)
            model.model.layers.append(layer)
        config.num_hidden_layers = shape.layers
    torch.set_default_dtype(torch.float32)
    return model


def contend(contender: Contender, line: Connection) -> None:
    """Says how many parameters there are, takes a step whenever it is told to, and answers with its seconds, with one
    thread those of its own CPU time; at the end with memory and all losses.
    """
    import peft
    import torch
    from transformers.models.llama import modeling_llama

    import parco
    from parco import adapters, machine
    from parco.training import fuse_loss_

    torch.set_num_threads(contender.threads)
    clock = time.process_time if contender.threads == 1 else time.perf_counter
    before = resident()
    model = bare(contender, modeling_llama)
    torch.manual_seed(contender.seed)
    if contender.library == "parco":
        parco.fuse_(model)
        fuse_loss_(model)
        adapters.add_(model, "lora(16)")
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    model.train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(contender.seed)
    words = torch.randint(VOCABULARY, (256,), generator=generator)
    likely = 1.0 / torch.arange(1, 257)
    losses: list[float] = []
    line.send(parco.nn.saved.numbers(model))
    while line.recv():
        count = contender.sequences * contender.window
        tokens = words[torch.multinomial(likely, count, True, generator=generator)].view(contender.sequences, -1)
        begin = clock()
        with torch.autocast("cpu", torch.bfloat16, enabled=contender.autocast):
            found = model(input_ids=tokens, labels=tokens).loss
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        machine.release_memory()
        losses.append(found.item())
        line.send(clock() - begin)
    line.send((resident() - before, losses))


@dataclass(frozen=True)
class Ran:
    """What a contender took: seconds of each counted step, megabytes, the losses of all steps."""

    parameters: int
    seconds: list[float]
    memory: float
    losses: list[float]


def race(contenders: Sequence[Contender], rounds: int, warm: int = 1) -> list[Ran]:
    """All of them, a step each in turn; `warm` rounds are not counted."""
    context = multiprocessing.get_context("spawn")
    lines: list[Connection] = []
    for each in contenders:
        line, other = context.Pipe()
        context.Process(target=contend, args=(each, other), daemon=True).start()
        lines.append(line)
    parameters = [line.recv() for line in lines]
    seconds: list[list[float]] = [[] for _ in lines]
    for turn in range(warm + rounds):
        for line, own in zip(lines, seconds, strict=True):
            line.send(True)
            taken = line.recv()
            if turn >= warm:
                own.append(taken)
    found: list[Ran] = []
    for line, own, count in zip(lines, seconds, parameters, strict=True):
        line.send(False)
        found.append(Ran(count, own, *line.recv()))
    return found
