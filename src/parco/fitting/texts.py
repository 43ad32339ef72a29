"""Token windows: what the fit looks at, what it checks itself with, and what it never sees until the end.

A text becomes consecutive windows of equal length, no overlap, a remainder dropped. `held` windows are only evaluated.
Of the calibration windows the last few are `check` windows: statistics and healing never see them, plans are compared
and healing is stopped by them.
"""

from __future__ import annotations

import errno
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parco.fitting.stages import seeded

WINDOW = 512
HELD_SHARE = 0.2
"""Share of a person's own text that is held out when it comes as one file."""


@dataclass(frozen=True)
class Windows:
    """Token windows [W, T] int64 of each use, and where they come from."""

    calibration: Tensor
    check: Tensor
    held: Tensor
    source: str
    digest: str
    generated: int = 0

    @property
    def length(self) -> int:
        return self.held.shape[1]

    def describe(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "sha256": self.digest,
            "window": self.length,
            "calibration_windows": self.calibration.shape[0],
            "check_windows": self.check.shape[0],
            "held_out_windows": self.held.shape[0],
            "generated_windows": self.generated,
        }


def window_length(model: nn.Module) -> int:
    """512 tokens, or the model's context when that is shorter."""
    config: Any = model.config
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or WINDOW
    return min(WINDOW, int(limit))


def read(path: Path) -> str:
    """A person's text. Raises FileNotFoundError where there is none and ValueError where it is not UTF-8 or empty."""
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "--data names no file", str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--data {path} is not UTF-8 text: byte {error.start} cannot be read") from error
    if not text.strip():
        raise ValueError(f"--data {path} is empty: give a text like what the model will read")
    return text


def tokenize(tokenizer: Any, text: str, length: int) -> Tensor:
    """All whole windows [W, length] int64 of the text; W may be 0. The tokenizer adds its own special tokens, once."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    count = len(ids) // length
    return torch.tensor(ids[: count * length], dtype=torch.long).view(count, length)


def too_short(name: str, tokenizer: Any, text: str, length: int) -> ValueError:
    tokens = len(tokenizer(text, verbose=False)["input_ids"])
    return ValueError(f"{name} is shorter than one window: it has {tokens} tokens and one window is {length}")


def own_text(tokenizer: Any, text: str, name: str, length: int) -> Windows:
    """Windows of a person's own text: its end is held out. Raises ValueError when it is shorter than one window."""
    windows = tokenize(tokenizer, text, length)
    if windows.shape[0] == 0:
        raise too_short(name, tokenizer, text, length)
    held = max(1, round(windows.shape[0] * HELD_SHARE))
    rest = windows[:-held] if windows.shape[0] > held else windows
    return split(rest, windows[-held:], name, fingerprint(text))


def two_texts(tokenizer: Any, calibration: str, held: str, name: str, length: int) -> Windows:
    """Windows of a calibration text and a held-out text that come as two files. Raises ValueError when one is too
    short.
    """
    parts = [tokenize(tokenizer, text, length) for text in (calibration, held)]
    for part, text in zip(parts, (calibration, held), strict=True):
        if part.shape[0] == 0:
            raise too_short(name, tokenizer, text, length)
    return split(parts[0], parts[1], name, fingerprint(calibration + held))


def split(windows: Tensor, held: Tensor, source: str, digest: str) -> Windows:
    """The last sixteenth of the windows (1 to 16) checks; a single window both calibrates and checks."""
    check = min(16, max(1, windows.shape[0] // 16))
    calibration = windows[:-check] if windows.shape[0] > check else windows
    return Windows(calibration, windows[-check:], held, source, digest)


def fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@torch.no_grad()
def generate(model: nn.Module, count: int, length: int, seed: int) -> Tensor:
    """`count` windows [count, length] that the model samples from itself at temperature 1, after its beginning-of-text
    token.

    A model's own text shows what it was trained on where nothing else does. Deterministic for a seed and thread count.
    """
    config: Any = model.config
    generator = seeded(seed, "generate")
    vocabulary = int(config.get_text_config().vocab_size)
    begin = config.bos_token_id if isinstance(config.bos_token_id, int) else None
    if begin is None:
        tokens = torch.randint(0, vocabulary, (count, 1), generator=generator)
    else:
        tokens = torch.full((count, 1), begin, dtype=torch.long)
    cache = None
    step = tokens
    while tokens.shape[1] < length:
        out = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        weights = torch.softmax(out.logits[:, -1].float(), -1)
        step = torch.multinomial(weights, 1, generator=generator)
        tokens = torch.cat([tokens, step], 1)
    return tokens
