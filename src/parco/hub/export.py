"""A model from any file that is read to any that is written."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TypedDict

from parco.hub.compressed import save_compressed
from parco.hub.dense import save_dense
from parco.hub.gguf import check_type, save_gguf
from parco.hub.load import load
from parco.hub.save import PAGES, refuse_foreign, save
from parco.nn import saved
from parco.weights import Quantized

TARGETS = ("parco", "compressed-tensors", "gguf")

_PLAN = "plan.json"


class Exported(TypedDict):
    """What `export` did: the model that was read, what was written and where, its bytes on the disk, how many matrices
    were stored in which format when it was read, what the library that quantized it computes otherwise, and what of a
    fit did not go along.
    """

    model: str
    to: str
    out: str
    nbytes: int
    stored: dict[str, int]
    notes: tuple[str, ...]


def export(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str = "parco",
    *,
    type: str | None = None,
    ends: str | None = None,
    round_scales: bool = False,
    dense: bool = False,
) -> Exported:
    """Reads `model`, which is what `load` takes, and writes it for `to`: "parco" is a folder that Transformers loads
    after `import parco` (a dense model's needs no import), to which a fit's plan and pages go along unless it is dense,
    "compressed-tensors" one for vLLM, "gguf" a file for llama.cpp.

    type, ends and round_scales are those of `save_gguf`, dense is that of `save_compressed`. Raises ValueError for an
    unknown `to`, for an option of another target and for an `out` that is or holds the model itself, FileExistsError
    for a file that is none of GGUF, and what `load` and the function that saves raise; then nothing is written.
    """
    if to not in TARGETS:
        raise ValueError(f"--to {to} is none of {', '.join(TARGETS)}")
    for name, value, owner in (
        ("type", type, "gguf"),
        ("ends", ends, "gguf"),
        ("round_scales", round_scales, "gguf"),
        ("dense", dense, "compressed-tensors"),
    ):
        if value and to != owner:
            given = name.replace("_", "-") if value is True else f"{name} {value}"
            raise ValueError(f"--{given} is for --to {owner}, not for --to {to}")
    if not os.fspath(out):
        raise ValueError("--out '' names no place: give a new folder, or with --to gguf a file")
    target = Path(out).expanduser().resolve()
    if to == "gguf":
        check_type(type, "type")
        check_type(ends, "ends")
        if target.is_dir():
            raise IsADirectoryError(f"{str(target)!r} is a folder: name the file that is to be written")
        _refuse_other_file(target)
    else:
        refuse_foreign(target)
    loaded = load(model)
    source = loaded.path.resolve()
    if target == source or target in source.parents:
        raise ValueError(f"--out {out} holds the model that is read, and would replace it: name another place")
    weights = saved.describe(loaded.model).weights
    left, notes = _left_by_a_fit(source), loaded.notes
    if to == "gguf":
        save_gguf(loaded.model, loaded.tokenizer, target, type, ends=ends, round_scales=round_scales)
    elif to == "compressed-tensors":
        save_compressed(loaded.model, loaded.tokenizer, target, dense=dense)
    elif weights:
        save(loaded.model, loaded.tokenizer, target, extra=left)
    else:
        save_dense(loaded.model, loaded.tokenizer, target)
    if left and (to != "parco" or not weights):
        notes += (f"{', '.join(left)} of the fit stay in {source}",)
    files = [target] if target.is_file() else [path for path in target.iterdir() if path.is_file()]
    return Exported(
        model=str(model),
        to=to,
        out=str(target),
        nbytes=sum(path.stat().st_size for path in files),
        stored=dict(Counter(str(spec.format if isinstance(spec, Quantized) else spec) for spec in weights.values())),
        notes=notes,
    )


def _left_by_a_fit(source: Path) -> dict[str, Path]:
    """The plan that a fit left beside the model, and its pages."""
    if not (source / _PLAN).is_file():
        return {}
    return {name: source / name for name in (_PLAN, *PAGES) if (source / name).is_file()}


def _refuse_other_file(target: Path) -> None:
    """Raises FileExistsError unless a GGUF file may replace `target`: absent, empty, or such a file itself."""
    if target.exists():
        with target.open("rb") as stream:
            if stream.read(4) not in (b"", b"GGUF"):
                raise FileExistsError(f"{str(target)!r} is a file of another kind: name one that is new or of GGUF")
