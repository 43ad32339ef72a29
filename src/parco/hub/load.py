"""A model and its tokenizer, out of a folder or from the Hugging Face hub.

Everything that can be known to be wrong is checked before the weights are loaded (see `checks`), because what a
person gets otherwise is a traceback from a thread, or worse a model with a few random matrices. No network is touched
for a folder."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, cast

import torch

from parco.hub import checks, foreign
from parco.hub.compressed import CompressedTensors
from parco.hub.gguf_read import read_gguf
from parco.hub.gptq import Awq, Gptq
from parco.hub.mxfp4 import Mxfp4
from parco.nn import linears
from parco.nn.saved import memory_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
_PICKLED_FILES = ["pytorch_model*.bin"]
LAYOUTS: dict[str, Callable[[dict[str, Any]], foreign.Layout]] = {
    "compressed-tensors": CompressedTensors,
    "gptq": Gptq,
    "awq": Awq,
    "mxfp4": Mxfp4,
}
"""Quantization methods of other libraries, and what reads their matrices."""

_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files that say it beside a config.json that does not, as older libraries wrote them."""

_OTHER_FILES = ["*/*", "consolidated*"]  # the same weights again, in other libraries' formats


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, its tokenizer, the folder (or GGUF file) they came from, its fingerprint (sha256,
    hexadecimal), and what the library that quantized the model computes otherwise than parco does."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: Path
    fingerprint: str
    notes: tuple[str, ...] = ()


def load(
    name_or_path: str | os.PathLike[str], dtype: torch.dtype | str | None = None, low_memory: bool = True
) -> Loaded:
    """The model in a folder, or of a name `owner/name` on the Hugging Face hub: dense, fitted by parco, or quantized by
    compressed-tensors, GPTQ or AWQ, or in gpt-oss's MXFP4, whose codes and scales are kept; or in a GGUF file, by its
    path (see `read_gguf`).

    dtype: a floating torch dtype or its name; None keeps the checkpoint's (bf16 stays bf16). low_memory: weights stay
    memory-mapped in their file where their dtype is kept; False copies them into memory, so that the file may change
    afterwards.

    A text is taken for a hub name only if it has the form owner/name and no such path exists here; nothing else touches
    the network. Code that comes with a checkpoint is never run; a pickled one (.bin) is read with weights_only=True.

    Raises FileNotFoundError, NotADirectoryError or ValueError with a text of one line: missing folder, not a model,
    no tokenizer, missing or truncated weights, NaN or infinite weights (naming the tensor), an architecture without
    linear layers, an unknown dtype, quantized tensors that fit neither one another nor the architecture. ImportError
    for a GGUF file without the library `gguf`."""
    wanted = _dtype(dtype)
    folder = _resolve(name_or_path)
    if _is_gguf(folder):
        loaded = _load_gguf(folder, wanted)
        if not low_memory:
            _own(loaded.model)
        return loaded
    layout = _layout(folder, checks.check_folder(folder))
    checks.check_tokenizer(folder)
    files = checks.weight_files(folder)
    checks.check_finite(files)
    notes: tuple[str, ...] = ()
    if layout is None:
        with _quietly(folder):
            model = _load_model(folder, wanted)
    else:
        model, notes = _load_foreign(folder, files, layout, wanted)
    with _quietly(folder):
        tokenizer = _load_tokenizer(folder)
    if any(file.suffix != ".safetensors" for file in files):
        checks.check_finite_tensors(iter(model.state_dict().items()), str(folder))
    if not linears(model):
        raise ValueError(
            f"{str(folder)!r} is an architecture without linear layers ({type(model).__name__}): parco has nothing to"
            " make cheaper in it"
        )
    if not low_memory:
        _own(model)
    return Loaded(model, tokenizer, folder, checks.fingerprint(folder), notes)


def locate(name_or_path: str | os.PathLike[str]) -> Path:
    """The folder or GGUF file that `load` would read, before the work of loading; a model named on the Hugging Face hub
    is downloaded. Raises what `load` raises where no model is there.
    """
    place = _resolve(name_or_path)
    if not _is_gguf(place):
        checks.check_folder(place)
    return place


def _is_gguf(place: Path) -> bool:
    return place.suffix.lower() == ".gguf" and place.is_file()


def _load_gguf(file: Path, dtype: torch.dtype | str) -> Loaded:
    """The model in a GGUF file; `dtype` "auto" is the narrowest that holds its plain numbers."""
    found = read_gguf(file)
    checks.check_finite_tensors(iter(found.foreign.tensors.items()), str(file))
    with _quietly(file):
        made = foreign.build(found.foreign, found.config, dtype if isinstance(dtype, torch.dtype) else found.dtype)
        model = _complete(file, *made)
    return Loaded(model, found.tokenizer, file, checks.fingerprint(file))


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None or dtype == "auto":
        return "auto"
    if not isinstance(found, torch.dtype) or found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype={dtype!r} is not one that models run in: give float32, bfloat16 or float16")
    return found


def _resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """The folder itself, or the local copy of a model named on the hub (downloaded at need)."""
    text = os.fspath(name_or_path)
    folder = Path(text).expanduser()
    is_hub_name = isinstance(name_or_path, str) and _HUB_NAME.fullmatch(text) is not None
    if folder.exists() or not is_hub_name or Path(text.split("/")[0]).is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(text, allow_patterns=_HUB_FILES, ignore_patterns=_OTHER_FILES))
        if not list(found.glob("*.safetensors")):
            snapshot_download(text, allow_patterns=_PICKLED_FILES, ignore_patterns=_OTHER_FILES)
        return found
    except Exception as error:  # the hub client raises dozens of kinds, of its own and of its HTTP library
        reason = _first_line(error)
        raise FileNotFoundError(
            f"no folder {text!r} here, and the Hugging Face hub gave no model of that name ({reason})"
        ) from error


def _load_model(folder: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    from parco.hub.registration import register

    register()
    found: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, trust_remote_code=False, weights_only=True, output_loading_info=True
    )
    return _complete(folder, *found)


def _complete(folder: Path, model: PreTrainedModel, info: dict[str, Any]) -> PreTrainedModel:
    """The model in evaluation mode, under the name of its folder. Raises ValueError where the files lacked a tensor."""
    model.config.name_or_path = model.name_or_path = str(folder)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{str(folder)!r} lacks {len(missing)} of the tensors that {type(model).__name__} needs, {missing[0]!r}"
            " first: copy or download it again"
        )
    return model.eval()


def _layout(folder: Path, settings: dict[str, Any]) -> foreign.Layout | None:
    """How another library stored the folder's matrices; None for dense and parco's own ones, which Transformers loads.
    ValueError, naming the folder, for a library or a variant that parco does not read.
    """
    quantized: Any = settings.get("quantization_config") or {}
    if not isinstance(quantized, dict):
        raise ValueError(
            f"{str(folder / checks.CONFIG)!r} has a quantization_config that is no object but {quantized!r}: copy or"
            " download it again"
        )
    for name, method in _BESIDE.items():
        if not quantized and (folder / name).is_file():
            quantized = {**checks.read_json(folder / name), "quant_method": method}
    quantized = cast(dict[str, Any], quantized)
    method = quantized.get("quant_method")
    if not quantized or method == "parco":
        return None
    if not isinstance(method, str) or method not in LAYOUTS:
        raise ValueError(
            f"{str(folder)!r} is already quantized by {method!r}, which parco does not read (it reads"
            f" {', '.join(LAYOUTS)}): give the original model in bf16, fp16 or fp32"
        )
    try:
        return LAYOUTS[method](quantized)
    except ValueError as error:
        raise ValueError(f"{str(folder)!r} cannot be read: {error}") from error


def _load_foreign(
    folder: Path, files: list[Path], layout: foreign.Layout, dtype: torch.dtype | str
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model that another library quantized, and what that library computes otherwise."""
    from transformers import AutoConfig, GenerationConfig

    pickled = next((file for file in files if file.suffix != ".safetensors"), None)
    if pickled is not None:
        raise ValueError(f"{str(pickled)!r} is pickled: parco reads quantized matrices from safetensors only")
    with _quietly(folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        bare = foreign.plain(config)
    found = foreign.read(files, layout, bare)
    computed: Any = config.dtype or torch.get_default_dtype() if dtype == "auto" else dtype
    with _quietly(folder):
        model = _complete(folder, *foreign.build(found, config, computed))
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model, found.notes


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _own(model: PreTrainedModel) -> None:
    """Copies every parameter and buffer out of the file it is mapped from, tied ones once."""
    copies: dict[tuple[object, ...], torch.Tensor] = {}
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            identity = memory_of(tensor)
            if identity not in copies:
                copies[identity] = tensor.data.clone()
            tensor.data = copies[identity]


@contextmanager
def _quietly(folder: Path) -> Generator[None]:
    """Turns what Transformers, safetensors and pickle raise into a ValueError of one line that names the folder.

    Their progress bars and the table that they print before raising are left out: the caller has its own, and the
    error names the tensor."""
    from transformers.utils import logging as transformers_logging

    log = logging.getLogger("transformers.modeling_utils")
    had_bar = transformers_logging.is_progress_bar_enabled()
    log.addFilter(_drop)
    transformers_logging.disable_progress_bar()
    try:
        yield
    except UnpicklingError as error:
        raise ValueError(
            f"{str(folder)!r} has pickled weights that hold more than tensors, which parco never runs: give it as"
            " safetensors"
        ) from error
    except Exception as error:  # a malformed model raises of every kind, and plain Exception from the tokenizers
        if isinstance(error, ValueError) and str(error).startswith(repr(str(folder))):
            raise
        raise ValueError(f"{str(folder)!r} could not be loaded by Transformers: {_first_line(error)}") from error
    finally:
        log.removeFilter(_drop)
        if had_bar:
            transformers_logging.enable_progress_bar()


def _drop(record: logging.LogRecord) -> bool:
    return record.levelno > logging.WARNING


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) < 240 else text[:237] + "..."
