"""An adapter made part of its model: a folder with neither more tensors nor slower products than the model's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypedDict

from parco import adapters, hub
from parco.fitting import evaluate, texts
from parco.fitting.stages import Progress, tell

MOST = 64
"""Windows of the text that judges a model stored anew."""


class Merged(TypedDict):
    """What `merge` did. Of a model whose matrices are stored in few bits the held-out losses with the adapter beside
    it, `before`, and merged, `after`, in nats per token over so many `windows`; None and 0 of a dense one, whose merged
    matrices are the sum, rounded once to their dtype.
    """

    model: str
    adapter: str
    folder: str
    stored: bool
    before: float | None
    after: float | None
    windows: int


def merge(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    progress: Progress,
    *,
    requantize: bool = False,
    text: str | None = None,
) -> Merged:
    """Adds the adapter in the folder `adapter` to the matrices of `model` and saves to `out` what Transformers loads,
    with the tokenizer.

    A model with stored weights is refused unless `requantize` asks to store the sums anew, each in the format that its
    matrix has; the loss that this costs is measured on `text`, by default the held-out text that comes with parco.
    Raises FileExistsError where `out` holds something, ValueError for an adapter of another model or one that is no sum
    (a bottleneck), what `hub.load` raises, and OSError for a full disk; then nothing is written.
    """
    hub.refuse_foreign(Path(out))
    loaded = hub.load(model, low_memory=False)
    tell(progress, loaded.notes)
    whole: Any = loaded.model
    stored = getattr(whole.config, "quantization_config", None) is not None
    if stored and not requantize:
        raise ValueError(
            f"{model} has stored weights: merging stores every sum anew and costs loss; ask for it by --requantize, or "
            "merge into the model that it was made from"
        )
    adapters.load_(whole, adapter)
    windows: Any = None
    if stored:
        length = texts.window_length(whole)
        given = hub.embedded_texts().heldout if text is None else text
        windows = texts.tokenize(loaded.tokenizer, given, length)[:MOST]
        if not len(windows):
            raise texts.too_short("the text that judges", loaded.tokenizer, given, length)
    before = evaluate.quality(whole, windows, progress).loss if stored else None
    adapters.merge_(whole, requantize=stored)
    after = evaluate.quality(whole, windows, progress).loss if stored else None
    (hub.save if stored else hub.save_dense)(whole, loaded.tokenizer, out)
    return Merged(
        model=str(model),
        adapter=str(adapter),
        folder=str(out),
        stored=stored,
        before=before,
        after=after,
        windows=0 if windows is None else len(windows),
    )
