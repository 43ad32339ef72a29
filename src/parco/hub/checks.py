"""What is checked in a model's folder before a byte of it is loaded.

Transformers is lenient where a long job must not be: it builds a tokenizer out of nothing when the files are absent,
only warns of weights that it did not find, and fails on a truncated file deep inside a thread. Each check here raises
an error whose text is one line that names the path (or the tensor) and what would be right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE_SINGLE = "pytorch_model.bin"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
FINGERPRINTED = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".tiktoken")


def check_folder(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a model's folder.

    Raises FileNotFoundError if there is no such folder, NotADirectoryError if it is a file, ValueError if it holds no
    readable config.json, or one that asks for code of its own."""
    if not folder.exists():
        raise FileNotFoundError(
            f"no folder {str(folder)!r}: give the folder of a Transformers model, or owner/name for one of the"
            " Hugging Face hub"
        )
    if not folder.is_dir():
        raise NotADirectoryError(f"{str(folder)!r} is a file: give the folder that holds the model's {CONFIG}")
    config = folder / CONFIG
    if not config.is_file():
        raise ValueError(f"{str(folder)!r} is not a model: it has no {CONFIG} (save one with model.save_pretrained)")
    content = read_json(config)
    if "model_type" not in content:
        raise ValueError(f"{str(config)!r} has no model_type: it is not the configuration of a Transformers model")
    if isinstance(content.get("auto_map"), dict) and "AutoModelForCausalLM" in content["auto_map"]:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if content["model_type"] not in CONFIG_MAPPING:
            raise ValueError(
                f"{str(folder)!r} needs code of its own ({content['auto_map']['AutoModelForCausalLM']}), which parco"
                " never runs: give a model whose architecture Transformers has"
            )
    if content.get("transformers_weights") is not None:
        raise ValueError(
            f"{str(config)!r} keeps its weights in {content['transformers_weights']!r}: rename the file to {SINGLE!r}"
        )
    return content


def check_tokenizer(folder: Path) -> None:
    """Raises ValueError if the folder has no tokenizer file (Transformers would make an empty one)."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES) and not list(folder.glob("*.tiktoken")):
        raise ValueError(
            f"{str(folder)!r} has no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there (save it with"
            " tokenizer.save_pretrained)"
        )


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, in the order of their names, each known to exist and, where it is safetensors,
    to be whole.

    Raises ValueError where there are none, one named by the index is absent, or one is truncated or not safetensors.
    """
    for index, single in ((INDEX, SINGLE), (PICKLE_INDEX, PICKLE_SINGLE)):
        if (folder / single).is_file():  # what Transformers loads, whether or not an index is there
            files = [folder / single]
            break
        if (folder / index).is_file():
            names = _shards(folder / index)
            absent = [name for name in names if not (folder / name).is_file()]
            if absent or not names:
                missing = absent[0] if absent else "every shard"
                raise ValueError(f"{str(folder)!r} lacks {missing}, which {index} names: copy or download it again")
            files = [folder / name for name in names]
            break
    else:
        raise ValueError(f"{str(folder)!r} has no weights: neither {SINGLE} nor {INDEX} nor {PICKLE_SINGLE} is there")
    for file in files:
        if file.suffix == ".safetensors":
            check_safetensors(file)
    return files


def _shards(index: Path) -> list[str]:
    """The names of the shards in an index, in order. Raises ValueError for one that is no plain file name."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{str(index)!r} has no weight_map: copy or download it again")
    names = sorted({str(name) for name in cast(dict[str, Any], shards).values()})
    for name in names:
        if name != Path(name).name:
            raise ValueError(f"{str(index)!r} names {name!r}, which is no file of its own folder: parco reads no other")
    return names


def check_safetensors(file: Path) -> None:
    """Raises ValueError unless the file's size is what its header says (8 bytes of length, header, data)."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):
            raise ValueError(f"{str(file)!r} is truncated or not safetensors ({size:,} bytes): download it again")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            end = max(
                (int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"), default=0
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(f"{str(file)!r} is not safetensors (no header in it): download it again") from error
    if size != 8 + length + end:
        state = "truncated" if size < 8 + length + end else "followed by foreign bytes"
        raise ValueError(
            f"{str(file)!r} is {state}: its header promises {8 + length + end:,} bytes and it has {size:,}; copy or"
            " download it again"
        )


def check_finite(files: list[Path]) -> None:
    """Raises ValueError naming the first tensor that holds NaN or infinity; reads each safetensors file once,
    memory-mapped.

    Files of another kind are checked after loading, by `check_finite_tensors`.
    """
    for file in files:
        if file.suffix == ".safetensors":
            try:
                _check_finite_file(*_state(file))
            except SafetensorError as error:
                raise ValueError(f"{str(file)!r} is not safetensors ({error}): download it again") from error


def check_finite_tensors(tensors: Iterator[tuple[str, torch.Tensor]], place: str) -> None:
    """Raises ValueError naming the first floating tensor with NaN or infinity, and the `place` where it is."""
    for name, tensor in tensors:
        found = first_nonfinite(tensor)
        if found is not None:
            what, index = found
            raise ValueError(
                f"tensor {name!r} of {place!r} holds {what} at {list(index)}: the checkpoint is damaged; give one with"
                " finite weights"
            )


def first_nonfinite(tensor: torch.Tensor) -> tuple[str, tuple[int, ...]] | None:
    """("NaN" or "infinity", its index) of the first non-finite element, or None; integers are always finite.

    One pass of `aminmax` over pieces of 4 Mi elements (it propagates NaN and needs no temporary), so that memory
    stays small."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.device.type == "meta":
        return None
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), 1 << 22):
        piece = flat[start : start + (1 << 22)]
        if piece.dtype.itemsize == 1:
            piece = piece.to(torch.float32)
        low, high = torch.aminmax(piece)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            at = int(torch.nonzero(~torch.isfinite(piece))[0])
            what = "NaN" if bool(torch.isnan(piece[at])) else "infinity"
            index = torch.unravel_index(torch.tensor(start + at), tensor.shape)
            return what, tuple(int(i) for i in index)
    return None


def fingerprint(folder: Path) -> str:
    """sha256 over the names, sizes and contents of the model's files, as 64 hexadecimal digits; of a file, its own.

    Only files that can belong to a model count (configuration, weights, tokenizer), so a report beside them does not
    change it; nor does the folder's own name or place."""
    if folder.is_file():
        return _digest(*_state(folder)).hex()
    total = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in FINGERPRINTED):
        total.update(f"{file.name}\0{file.stat().st_size}\0".encode() + _digest(*_state(file)))
    return total.hexdigest()


def _state(file: Path) -> tuple[Path, int, int]:
    """What tells one content of a file from another: a fit loads a folder many times and looks through it once."""
    found = file.stat()
    return file, found.st_size, found.st_mtime_ns


@lru_cache(maxsize=256)
def _digest(file: Path, size: int, changed: int) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


@lru_cache(maxsize=256)
def _check_finite_file(file: Path, size: int, changed: int) -> None:
    check_finite_tensors(_tensors(file), str(file))


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; ValueError, naming the file, if it holds anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is not JSON ({error}): copy or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} holds no JSON object: copy or download it again")
    return cast(dict[str, Any], content)


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(file, framework="pt", device="cpu") as content:
        for name in sorted(content.keys()):
            yield name, content.get_tensor(name)
