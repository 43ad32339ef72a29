"""Judge saved models on a text, as `parco eval` does: one alone, or one beside another, usually the original."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from parco.fitting import evaluate, measure, size, texts
from parco.fitting.result import Column
from parco.fitting.stages import Progress

ROUNDS = 5


class Judged(Protocol):
    """What is needed of a loaded model; `hub.Loaded` has it."""

    @property
    def model(self) -> Any: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def path(self) -> Any: ...


def judge(
    loaded: Judged, text: str, named: str, progress: Progress, against: Judged | None = None
) -> tuple[Column, Column | None]:
    """The measurements of `loaded` on every whole window of `text`, and those of `against` where it is given.

    Loss is the mean over the windows of what a plain Transformers loop gives (see evaluate.py). With `against`, KL and
    agreement are measured against it and speeds in turn with it; alone they are 0 and 1. `named` is how errors call the
    text. Raises ValueError where the text is shorter than one window, or the two models read it as different tokens.
    """
    models = {"model": loaded} if against is None else {"model": loaded, "against": against}
    length = min(texts.window_length(each.model) for each in models.values())
    windows = texts.tokenize(loaded.tokenizer, text, length)
    if windows.shape[0] == 0:
        raise texts.too_short(named, loaded.tokenizer, text, length)
    if against is not None and not torch.equal(texts.tokenize(against.tokenizer, text, length), windows):
        raise ValueError(
            f"--against {against.path} and {loaded.path} read the text differently: give models of one tokenizer"
        )
    quality = evaluate.quality(loaded.model, windows, progress, None if against is None else against.model)
    progress.stage("speed and memory", 1 + len(models))
    speeds = measure.interleaved({name: each.model for name, each in models.items()}, length, ROUNDS)
    progress.advance()
    column = _column("model", loaded, quality, speeds["model"], windows, progress)
    if against is None:
        return column, None
    other = evaluate.Quality(quality.original_loss, 0.0, 1.0, quality.original_loss)
    return column, _column("against", against, other, speeds["against"], windows, progress)


def _column(
    name: str,
    loaded: Judged,
    quality: evaluate.Quality,
    speeds: tuple[float, float],
    windows: Tensor,
    progress: Progress,
) -> Column:
    decode, prefill = speeds
    stored = size.stored_bytes(loaded.model)
    memory = evaluate.peak_memory(loaded.path)
    progress.advance()
    return Column(
        name=name,
        bytes=stored,
        fraction=stored / size.checkpoint_bytes(loaded.model),
        loss=quality.loss,
        perplexity=quality.perplexity,
        kl=quality.kl,
        top1=quality.top1,
        decode=1.0 / decode,
        prefill=windows.shape[1] / prefill,
        memory=memory,
    )
