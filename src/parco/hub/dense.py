"""Writes a model without stored weights as Transformers does, but whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from parco.hub.save import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_dense(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike[str]) -> Path:
    """Saves model and tokenizer by their own `save_pretrained`, in place of what `folder` held; returns the folder.

    Raises OSError where the disk is full or cannot be written: then nothing has changed.
    """
    target = Path(folder).expanduser().resolve()
    with whole(target, sum(parameter.nbytes for parameter in model.parameters())) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return target
