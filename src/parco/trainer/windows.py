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
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parco.fitting.stages import Progress, is_full
from parco.machine import cache_folder

PIECE = 1 << 20
"""Characters that are read and tokenized at once."""
HELD_SHARE, MOST_HELD = 0.05, 256
"""Of the windows of a text that comes without one to judge by: the share and number at its end that is held out."""


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
) -> Split:
    """The windows of the files in `data`; those of `held`, or else the last 5%, at most 256, are not trained on.

    A folder stands for all files below it, in the order of their paths. Raises FileNotFoundError for what is not there
    and ValueError where a file is no UTF-8 text or the text is shorter than two windows.
    """
    train, digest = windows(data, tokenizer, length, progress)
    if held is not None:
        judge, other = windows([held], tokenizer, length, progress)
        return Split(train, judge, hashlib.sha256((digest + other).encode()).hexdigest())
    if len(train) < 2:
        raise ValueError(
            f"--data gives {len(train)} windows of {length} tokens: at least 2 are needed, give more text or a smaller "
            "--seq"
        )
    kept = len(train) - min(MOST_HELD, max(1, round(HELD_SHARE * len(train))))
    return Split(train.select(range(kept)), train.select(range(kept, len(train))), digest)


def windows(data: Sequence[str | os.PathLike[str]], tokenizer: Any, length: int, progress: Progress) -> tuple[Any, str]:
    """The dataset of all windows of these files, and the SHA-256 of them, the tokenizer and the length."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    files = _files(data)
    digest = _digest(files, tokenizer, length)
    folder = cache_folder() / "windows" / digest[:32]
    if not folder.exists():
        datasets.disable_progress_bars()
        folder.parent.mkdir(parents=True, exist_ok=True)
        progress.stage("tokens", sum(file.stat().st_size for file in files))
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as temporary:
            try:
                _write(files, tokenizer, length, Path(temporary), digest, progress)
            except (DatasetGenerationError, OSError) as error:
                cause = error.__cause__ or error  # of what datasets says, the reason
                if is_full(cause):
                    raise OSError(errno.ENOSPC, "the disk is full: no tokens were written to", str(folder)) from error
                raise cause from None
            try:
                (Path(temporary) / "whole").rename(folder)
            except OSError:
                if not folder.exists():  # another process was as fast
                    raise
    return datasets.Dataset.load_from_disk(str(folder)).with_format("torch"), digest


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch: input_ids and labels int64 [rows, length], the same numbers, and the windows' numbers."""
    tokens = torch.stack([row["input_ids"] for row in rows]).long()
    return {"input_ids": tokens, "labels": tokens, "window": torch.stack([row["window"] for row in rows])}


def _files(data: Sequence[str | os.PathLike[str]]) -> list[Path]:
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
    return found


def _digest(files: Sequence[Path], tokenizer: Any, length: int) -> str:
    """Of the bytes of all files in their order, of the tokenizer and the length."""
    made = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            made.update(hashlib.file_digest(opened, "sha256").digest())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    made.update(f"{words} {tokenizer.eos_token_id} {length}".encode())
    return made.hexdigest()


def _write(files: Sequence[Path], tokenizer: Any, length: int, folder: Path, digest: str, progress: Progress) -> None:
    """The folder "whole" below `folder`, as datasets saves it."""
    import datasets

    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("int32"), length=length), "window": datasets.Value("int64")}
    )

    def rows() -> Iterator[dict[str, Any]]:
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

    made: Any = datasets.Dataset.from_generator(
        rows, features=features, cache_dir=str(folder / "cache"), fingerprint=digest[:32]
    )
    made.save_to_disk(str(folder / "whole"))


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
