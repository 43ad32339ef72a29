"""Writes a fitted model as a folder that Transformers loads after `import parco`: whole, or not at all.

Everything is written into a hidden folder beside the target and flushed to the disk; only then does a rename put it
in place. A process that dies half way leaves the target as it was, and the next save removes what it left. The files
are a function of the model alone: no dates, no names of the machine, tensors in a fixed order."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from parco.nn import saved

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARD_BYTES = 4_000_000_000
Content = str | bytes | Path

RESULT = "result.json"
PAGES = ("report.html", RESULT)
"""What a fit leaves beside its model and plan. The last is what it measured, of one model: beside another it would be
wrong, and to make it again takes a fit.
"""

MARK = {"saved_by": "parco"}
"""Metadata of weights whose configuration does not say it."""


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike[str],
    plan: str | Mapping[str, Any] | None = None,
    extra: Mapping[str, Content] | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Saves model, tokenizer, generation settings, `plan` (as plan.json) and `extra` files; returns the folder, which
    is whole or absent.

    extra: file name -> text, bytes, or the path of a file to copy. Weights above `shard_bytes` are split into shards
    with an index. A folder that parco saved is replaced, all of it, once the new one is whole; of any other only an
    empty one is. One that holds a fit's result is replaced by another fit's only.

    Raises FileExistsError if the folder holds something else, ValueError for an extra name that is not a plain file
    name or is taken, and OSError where the disk is full or cannot be written: then nothing is left behind."""
    target = Path(folder).expanduser().resolve()
    refuse_foreign(target, extra or ())
    from parco.hub.quantizer import ParcoConfig

    content = saved.tensors_to_save(model)
    with whole(target, sum(tensor.nbytes for tensor in content.values())) as temporary:
        write_weights(temporary, content, shard_bytes)
        write_settings(temporary, model, tokenizer, ParcoConfig.of(model))
        write_extra(temporary, extra if plan is None else {**(extra or {}), "plan.json": _plan(plan)})
    return target


@contextmanager
def whole(target: Path, needed: int) -> Generator[Path]:
    """A hidden folder beside `target`, an absolute path, to write `needed` bytes into; what lies in it when the block
    ends becomes `target`, flushed to the disk and in place of what was there, or nothing does.

    Raises OSError, in one line, where the disk is full or cannot be written: then nothing is left behind."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    _refuse_if_full(target, needed)
    temporary = target.parent / f".{target.name}.parco-{os.getpid()}"
    try:
        temporary.mkdir()
        yield temporary
        flush(temporary)
        put_in_place(temporary, target)
    except (OSError, SafetensorError) as error:
        _explain(error, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def attach(model: PreTrainedModel) -> PreTrainedModel:
    """Lets a model converted in memory save itself: `model.save_pretrained(folder)` then writes what `save` would;
    returns the model.

    Without this Transformers writes the new tensors under a configuration that does not speak of them.
    """
    from parco.hub.quantizer import ParcoConfig, ParcoQuantizer

    config = ParcoConfig.of(model)
    model.config.quantization_config = config
    vars(model)["hf_quantizer"] = ParcoQuantizer(config)
    return model


def refuse_foreign(target: Path, extra: Collection[str] = ()) -> None:
    """Raises FileExistsError unless `save` with `extra` files may replace `target`: absent, an empty folder, or one
    that parco saved. A fit's result in it is lost only to another among `extra`."""
    if not target.exists():
        return
    remedy = "name a folder that is new, empty, or was saved by parco"
    if not target.is_dir():
        raise FileExistsError(f"{str(target)!r} is a file: {remedy}")
    if not any(target.iterdir()):
        return
    if not _is_ours(target):
        raise FileExistsError(f"{str(target)!r} holds files that parco did not save and would replace: {remedy}")
    if (target / RESULT).exists() and RESULT not in extra:
        raise FileExistsError(f"{str(target)!r} holds a fit's result, which would be lost: name another folder")


def _is_ours(folder: Path) -> bool:
    """Whether parco saved the folder: its configuration says so, or the mark in its weights."""
    with suppress(OSError, ValueError, AttributeError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config.get("quantization_config", {}).get("quant_method") == "parco":
            return True
    for file in sorted(folder.glob("model*.safetensors"))[:1]:
        with suppress(OSError, SafetensorError), safe_open(file, framework="pt") as content:
            return MARK.items() <= (content.metadata() or {}).items()
    return False


def write_weights(
    folder: Path,
    content: dict[str, torch.Tensor],
    shard_bytes: int = SHARD_BYTES,
    marks: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors as safetensors whose metadata have `marks`, in shards with an index where they exceed
    `shard_bytes`."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(
        content, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    for file, names in sorted(split.filename_to_tensors.items()):
        shard = {name: _apart(content[name]) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt", **(marks or {})})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _apart(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU, contiguous, and in a storage of its own size, as safetensors requires."""
    found = tensor.detach().to("cpu").contiguous()
    return found if found.untyped_storage().nbytes() == found.nbytes else found.clone()


def write_settings(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, quantization: Any | None
) -> None:
    """config.json with `quantization` as its quantization_config, generation_config.json and the tokenizer's files."""
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = saved.compute_dtype(model)
    config.quantization_config = quantization
    if quantization is None:
        del config.quantization_config
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    _settled(tokenizer).save_pretrained(folder)


def _settled(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy without what past calls left in it (padding, truncation) and without the options that it was loaded
    with."""
    settled = copy.deepcopy(tokenizer)
    for option in ("is_local", "local_files_only", "trust_remote_code"):
        settled.init_kwargs.pop(option, None)
    backend: Any = getattr(settled, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    return settled


def _plan(plan: str | Mapping[str, Any]) -> str:
    return plan if isinstance(plan, str) else json.dumps(plan, indent=1) + "\n"


def write_extra(folder: Path, extra: Mapping[str, Content] | None) -> None:
    """Writes files beside those of a model. Raises ValueError for a name that is not plain or is taken."""
    for name, content in (extra or {}).items():
        if name != Path(name).name or name in ("", ".", ".."):
            raise ValueError(f"extra={name!r} is not a plain file name: leave folders out of it")
        if (folder / name).exists():
            raise ValueError(f"extra={name!r} is a file of the model itself: give it another name")
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        else:
            (folder / name).write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def flush(folder: Path) -> None:
    """Waits until the files and the folder's own entries are on the disk."""
    for path in [*sorted(folder.iterdir()), folder]:
        _synchronize(path)


def _synchronize(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(temporary: Path, target: Path) -> None:
    """Renames a flushed folder; a former target steps aside first and is removed last, or comes back if that fails."""
    former = target.parent / f".{target.name}.parco-{os.getpid()}-former"
    had_former = target.exists()
    if had_former:
        target.rename(former)
    try:
        temporary.rename(target)
    except OSError:
        if had_former:
            former.rename(target)
        raise
    _synchronize(target.parent)
    shutil.rmtree(former, ignore_errors=True)


def _remove_abandoned(target: Path) -> None:
    """Removes what saves of this target left that were killed (their process is gone); a former target comes back if
    it is the only one."""
    for path in sorted(target.parent.glob(f".{escape(target.name)}.parco-*")):
        owner = path.name.removeprefix(f".{target.name}.parco-").removesuffix("-former")
        if not owner.isdigit() or (int(owner) != os.getpid() and Path(f"/proc/{owner}").exists()):
            continue
        if path.name.endswith("-former") and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _refuse_if_full(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        text = f"no room for the model: it needs {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free"
        raise OSError(errno.ENOSPC, text, str(target))


def _explain(error: OSError | SafetensorError, target: Path) -> NoReturn:
    """Raises an OSError of one line that says that nothing was saved, and why."""
    if isinstance(error, FileExistsError):
        raise error
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    code = (error.errno if isinstance(error, OSError) else None) or errno.EIO
    if full or "No space left" in text or "os error 28" in text:
        code, text = errno.ENOSPC, "the disk is full; free some space or choose another place"
    raise OSError(code, f"nothing was saved: {text}", str(target)) from error
