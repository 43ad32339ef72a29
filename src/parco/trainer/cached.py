"""Rows made once and kept in parco's cache: a memory-mapped Arrow file below a folder that is named by a digest."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from parco.fitting.stages import Progress, is_full
from parco.hub.save import flush
from parco.machine import cache_folder

Rows = Callable[[dict[str, int]], Iterator[dict[str, Any]]]
"""Makes the rows; what it counts meanwhile goes into the dictionary that it is given."""


def dataset(digest: str, features: Any, rows: Rows, size: int, progress: Progress) -> Any:
    """The dataset of `features` that `rows` makes, with torch tensors, from the cache where it was made before; what
    was counted is in `counts_of` it. `size` is how far `rows` advances `progress` in all.

    Raises OSError where the disk is full, and what `rows` raises; then nothing is kept.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    folder = cache_folder() / "windows" / digest[:32]
    if not folder.exists():
        datasets.disable_progress_bars()
        folder.parent.mkdir(parents=True, exist_ok=True)
        progress.stage("tokens", size)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as temporary:
            try:
                _write(features, rows, Path(temporary), digest)
            except (DatasetGenerationError, OSError) as error:
                cause = error.__cause__ or error  # of what datasets says, the reason
                if is_full(cause):
                    raise OSError(errno.ENOSPC, "the disk is full: no tokens were written to", str(folder)) from error
                raise cause from None
            flush(Path(temporary) / "whole")
            try:
                (Path(temporary) / "whole").rename(folder)
            except OSError:
                if not folder.exists():  # another process was as fast
                    raise
    return datasets.Dataset.load_from_disk(str(folder)).with_format("torch")


def _write(features: Any, rows: Rows, folder: Path, digest: str) -> None:
    """The folder "whole" below `folder`, as datasets saves it."""
    import datasets

    counts: dict[str, int] = {}
    made: Any = datasets.Dataset.from_generator(
        lambda: rows(counts), features=features, cache_dir=str(folder / "cache"), fingerprint=digest[:32]
    )
    made.info.description = "\n".join(f"{name} {count}" for name, count in counts.items())
    made.save_to_disk(str(folder / "whole"))


def counts_of(made: Any) -> dict[str, int]:
    """What was counted when the rows were made, by name; of a selection that of all."""
    words = (line.rpartition(" ") for line in made.info.description.splitlines())
    return {name: int(count) for name, _, count in words}
