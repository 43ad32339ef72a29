"""Text files as windows of tokens in one memory-mapped Arrow file, written once for each text, tokenizer and length.

Every file is a document: the tokenizer's own special tokens begin it, its end-of-text token ends it where it has one.
Documents follow one another without padding, and every window holds `length` tokens of that stream; what is left at the
end is dropped.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parco.fitting.stages import Progress
from parco.trainer import cached

PIECE = 1 << 20
"""Characters that are read and tokenized at once."""
HELD_SHARE, MOST_HELD = 0.05, 256
"""Of the windows of a text that comes without one to judge by: the share and number at its end that is held out."""


Reader = Callable[[Sequence[str | os.PathLike[str]], Any, int, Progress], tuple[Any, str]]
"""Makes files, a tokenizer and a length a dataset of windows and the SHA-256 of what they were made of."""


class Split(NamedTuple):
    """The windows that are trained on and those that only judge, datasets of rows {"input_ids": int32 [length],
    "window": its number}, and the SHA-256 of what they were made of.
    """

    train: Any
    held: Any
    digest: str


def split(
    data: Sequence[str | os.PathLike[str]],
    held: str | os.PathLike[str] | None,
    tokenizer: Any,
    length: int,
    progress: Progress,
    read: Reader | None = None,
    most: int = MOST_HELD,
) -> Split:
    """The windows that `read` (default: `windows`) makes of the files in `data`; those of `held`, or else the last 5%,
    at most `most`, are not trained on.

    A folder stands for all files below it, in the order of their paths. Raises FileNotFoundError for what is not there
    and ValueError where a file is no UTF-8 text or the text is shorter than two windows.
    """
    read = read or windows
    train, digest = read(data, tokenizer, length, progress)
    if held is not None:
        judge, other = read([held], tokenizer, length, progress)
        return Split(train, judge, hashlib.sha256((digest + other).encode()).hexdigest())
    if len(train) < 2:
        raise ValueError(
            f"--data gives {len(train)} windows of {length} tokens: at least 2 are needed, give more text or a smaller "
            "--seq"
        )
    kept = len(train) - min(most, max(1, round(HELD_SHARE * len(train))))
    return Split(train.select(range(kept)), train.select(range(kept, len(train))), digest)


def windows(data: Sequence[str | os.PathLike[str]], tokenizer: Any, length: int, progress: Progress) -> tuple[Any, str]:
    """The dataset of all windows of these files, and the SHA-256 of them, the tokenizer and the length."""
    import datasets

    files = files_of(data)
    digest = digest_of(files, tokenizer, str(length))
    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("int32"), length=length), "window": datasets.Value("int64")}
    )

    def rows(counts: dict[str, int]) -> Iterator[dict[str, Any]]:
        left: list[int] = []
        count = 0
        for tokens in _tokens(files, tokenizer, progress):
            left += tokens
            for begin in range(0, len(left) - length + 1, length):
                yield {"input_ids": left[begin : begin + length], "window": count}
                count += 1
            left = left[len(left) - len(left) % length :]
        if not count:
            raise ValueError(f"the text in {', '.join(map(str, files))} is shorter than one window of {length} tokens")

    size = sum(file.stat().st_size for file in files)
    return cached.dataset(digest, features, rows, size, progress), digest


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch: input_ids and labels int64 [rows, length], where rows have no labels the same numbers, their
    position_ids where they have them, and the windows' numbers.
    """
    batch = {name: torch.stack([row[name] for row in rows]).long() for name in rows[0]}
    return {"labels": batch["input_ids"]} | batch


def files_of(data: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """All files that these paths stand for. Raises FileNotFoundError or ValueError where there is none, or all of them
    are empty.
    """
    found: list[Path] = []
    for given in map(Path, data):
        if given.is_dir():
            below = sorted(path for path in given.rglob("*") if path.is_file())
            if not below:
                raise ValueError(f"--data {given} is a folder without files")
            found += below
        elif given.exists():
            found.append(given)
        else:
            raise FileNotFoundError(errno.ENOENT, "--data names no file", str(given))
    if not any(file.stat().st_size for file in found):
        raise ValueError(f"--data {', '.join(map(str, data))} is empty: give text to train on")
    return found


def digest_of(files: Sequence[Path], tokenizer: Any, how: str) -> str:
    """The SHA-256 of the bytes of all files in their order, of the tokenizer and of `how` they become windows."""
    made = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            made.update(hashlib.file_digest(opened, "sha256").digest())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    made.update(f"{words} {tokenizer.eos_token_id} {how}".encode())
    return made.hexdigest()


def _tokens(files: Sequence[Path], tokenizer: Any, progress: Progress) -> Iterator[list[int]]:
    """The tokens of every document, piece after piece."""
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    for file in files:
        first = True
        for piece in _pieces(file):
            ids = tokenizer(piece, verbose=False, add_special_tokens=first)["input_ids"]
            if ids[-1:] == end:  # one that the tokenizer adds to every text
                ids = ids[:-1]
            yield list(ids)
            first = False
            progress.advance(len(piece.encode()))
        if not first:
            yield end


def _pieces(file: Path) -> Iterator[str]:
    """The text of a file in pieces of about a million characters, cut before a line that begins with a letter: few
    tokenizers join anything across such a place.
    """
    left = ""
    with file.open(encoding="utf-8", newline="") as opened:
        try:
            while read := opened.read(PIECE):
                left += read
                cut = len(left)
                while cut > 0 and not (left[cut - 1 : cut] == "\n" and left[cut : cut + 1].isalpha()):
                    cut = left.rfind("\n", 0, cut - 1) + 1
                if cut:
                    yield left[:cut]
                    left = left[cut:]
        except UnicodeDecodeError as error:
            buffer: Any = opened.buffer
            at = buffer.tell() - len(error.object) + error.start
            raise ValueError(f"--data {file} is not UTF-8 text: byte {at} cannot be read") from error
    if left:
        yield left
