"""`parco generate`: let a model write, token by token."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from parco.cli import terminal


def generate(
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="A fitted folder, any Transformers checkpoint, or a GGUF file.")
    ],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the model continues.")],
    tokens: Annotated[int, typer.Option(metavar="N", help="At most so many tokens.")] = 100,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 always takes the most likely token; larger values vary more.")
    ] = 0.7,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed writes the same text.")] = 0,
    debug: terminal.Debug = False,
) -> None:
    """Continue PROMPT with the model in DIR, printing as it writes."""
    if tokens < 1:
        raise ValueError(f"--tokens {tokens}: give at least 1")
    if not temperature >= 0:
        raise ValueError(f"--temperature {temperature:g}: give 0 or more")
    terminal.quiet_libraries()
    import torch

    from parco import hub, nn

    loaded = hub.load(model)
    terminal.show_notes(loaded.notes)
    nn.fuse_(loaded.model)
    writer: Any = loaded.model
    from transformers import TextStreamer

    inputs = loaded.tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("PROMPT is empty: give at least one token to continue")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    writer.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=tokens,
        streamer=TextStreamer(loaded.tokenizer, skip_special_tokens=True),
        **sampling,
    )
