"""The small language model that ships with parco, and the two texts that go with it.

`scripts/train_embedded.py` made them; training.json beside the weights says how.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Texts(NamedTuple):
    """Python sources of the standard library: `heldout` was never trained on, `calibration` is part of the training
    text."""

    heldout: str
    calibration: str


def embedded_path() -> Path:
    """The folder of the shipped model; `load` and Transformers' `from_pretrained` take it."""
    return Path(__file__).parent / "embedded"


def embedded_texts() -> Texts:
    """The shipped texts, decoded from UTF-8 (line ends as in the files)."""
    folder = embedded_path()
    return Texts(*((folder / f"{name}.txt").read_bytes().decode("utf-8") for name in Texts._fields))
