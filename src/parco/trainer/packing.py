"""Examples in windows: several in each, apart from one another.

In a window positions begin anew with every example; Transformers' models see by that where one ends and let none attend
to another, and no token is learned from another example's. A window's end is filled with padding, an example that
nothing is learned from. An example longer than a window is cut off there; one without an answer before that is left
out; both are counted.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from parco.fitting.stages import Progress
from parco.trainer import cached, examples
from parco.trainer.examples import IGNORED, Example
from parco.trainer.windows import Reader, digest_of, files_of

LAYOUT = 1
"""To be raised when the same lines are to become other windows: those that were made before are then made anew."""
OPEN = 32
"""Windows that are open at once for more examples; the fullest is closed for a new one."""


def reader(data: Sequence[str | os.PathLike[str]], packed: bool) -> Reader | None:
    """How these files become windows where all of them are JSON lines; None where they are texts. Raises ValueError for
    both together.
    """
    files = files_of(data)
    lines = [file for file in files if file.suffix == ".jsonl"]
    if not lines:
        return None
    if len(lines) < len(files):
        other = next(file for file in files if file.suffix != ".jsonl")
        raise ValueError(f"--data has JSON lines ({lines[0].name}) and other files ({other.name}): give one kind")
    return functools.partial(windows, packed=packed)


def windows(
    data: Sequence[str | os.PathLike[str]], tokenizer: Any, length: int, progress: Progress, packed: bool = True
) -> tuple[Any, str]:
    """The dataset of windows of these files of JSON lines, rows {"input_ids", "labels", "position_ids": int32 [length],
    "window": its number}, and the SHA-256 of them, the tokenizer, its template, the length and the packing. Without
    `packed` each example has a window of its own, and there are no position_ids.

    `cached.counts_of` says how many "examples" there are, how many were "cut" or "left out", and their "tokens". Raises
    ValueError for a broken line and where no example is left.
    """
    import datasets

    files = files_of(data)
    special = sorted(tokenizer.special_tokens_map.items(), key=str)
    digest = digest_of(files, tokenizer, f"{LAYOUT} {length} {packed} {tokenizer.chat_template} {special}")
    names = ["input_ids", "labels", *(["position_ids"] if packed else [])]
    numbers = datasets.List(datasets.Value("int32"), length=length)
    features = datasets.Features(dict.fromkeys(names, numbers) | {"window": datasets.Value("int64")})

    def rows(counts: dict[str, int]) -> Iterator[dict[str, Any]]:
        padding = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
        found = _kept(examples.read(files, tokenizer, progress.advance), length, counts)
        for number, held in enumerate(pack(found, length, OPEN if packed else 0)):
            row = _row(held, length, int(padding))
            yield {name: row[name] for name in names} | {"window": number}
        if not counts["examples"]:
            raise ValueError(
                f"no example in {', '.join(map(str, files))} has an answer within {length} tokens: give a greater --seq"
            )

    size = sum(file.stat().st_size for file in files)
    return cached.dataset(digest, features, rows, size, progress), digest


def _kept(found: Iterable[Example], length: int, counts: dict[str, int]) -> Iterator[Example]:
    """The examples, cut to `length` tokens, that still have an answer; counts all that happens."""
    counts.update({"examples": 0, "cut": 0, "left out": 0, "tokens": 0})
    for tokens, labels in found:
        if all(label == IGNORED for label in labels[:length]):
            counts["left out"] += 1
            continue
        counts["examples"] += 1
        counts["cut"] += len(tokens) > length
        counts["tokens"] += min(len(tokens), length)
        yield Example(tokens[:length], labels[:length])


def pack(found: Iterable[Example], length: int, most: int) -> Iterator[list[Example]]:
    """The examples, of at most `length` tokens each, in windows of `length`: each goes into the fullest of at most
    `most` open windows that has room for it.
    """
    opened: list[tuple[int, list[Example]]] = []
    for example in found:
        size = len(example.tokens)
        fitting = [(room, index) for index, (room, _) in enumerate(opened) if size <= room]
        if fitting:
            room, index = min(fitting)
            opened[index] = room - size, [*opened[index][1], example]
            continue
        opened.append((length - size, [example]))
        if len(opened) > most:
            fullest = min(range(len(opened)), key=lambda index: opened[index][0])
            yield opened.pop(fullest)[1]
    yield from (held for _, held in opened)


def _row(held: Sequence[Example], length: int, padding: int) -> dict[str, list[int]]:
    """One window, with padding as the last of its examples."""
    room = length - sum(len(example.tokens) for example in held)
    parts = [*held, Example([padding] * room, [IGNORED] * room)]
    return {
        "input_ids": [token for part in parts for token in part.tokens],
        "labels": [label for part in parts for label in part.labels],
        "position_ids": [position for part in parts for position in range(len(part.tokens))],
    }


def keeps_apart(model: Any) -> bool:
    """Whether this model lets examples in one window see nothing of one another."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    tokens = torch.arange(12)[None] % model.config.get_text_config().vocab_size
    embedded = model.eval().get_input_embeddings()(tokens).detach().requires_grad_()
    positions = torch.tensor([[*range(5), *range(7)]])
    said = model(inputs_embeds=embedded, position_ids=positions, use_cache=False).logits[0, 5:].float().square().sum()
    return not torch.autograd.grad(said, embedded)[0][0, :5].any()
