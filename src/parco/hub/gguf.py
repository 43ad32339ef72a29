"""Writes a model as one GGUF file, which llama.cpp runs, and tools of its kind.

What parco stores in few bits keeps its numbers where one of GGML's types holds them (see `ggml`); dense matrices keep
their dtype or are rounded to a type by llama.cpp's own rule. The library `gguf` (the extra of that name) writes the
container.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from parco.hub import ggml, vocabulary
from parco.nn import StoredWeight, embedding_name, head_name
from parco.nn.saved import refuse_adapters
from parco.weights import Dense, Weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Transformers' model types, and what llama.cpp calls them."""

INTERLEAVED = ("llama", "mistral")
"""llama.cpp turns neighbouring numbers of these models' queries and keys, Transformers those half a head apart."""

_ROPE = ("default", "linear", "llama3")
"""Rotary embeddings that differ in their frequencies alone."""


class GgufMissingError(ImportError, ValueError):
    """The library `gguf` is not installed: an ImportError, and for commands wrong use, which is one line."""

    def __init__(self, what: str) -> None:
        super().__init__(f"GGUF files are {what} through the library gguf: pip install 'parco[gguf]'")


class _Entry(NamedTuple):
    """One tensor of the file: its name there, GGML's type, the shape of the numbers, and where it comes from."""

    name: str
    type: str
    shape: tuple[int, ...]
    source: StoredWeight | Tensor
    heads: int


def save_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    file: str | os.PathLike[str],
    type: str | None = None,
    *,
    ends: str | None = None,
    round_scales: bool = False,
) -> Path:
    """Writes a Llama, Mistral, Qwen2 or Qwen3 for llama.cpp; returns the path of the file, which is whole or absent.

    type: None writes every matrix as it is stored, in the smallest type that holds its numbers: dense ones in their
    dtype, groups of a multiple of 32 integers as Q4_0 (up to 4 bits), Q4_1 (with zero points) or Q8_0, ternary ones as
    TQ2_0 and five of them to a byte as TQ1_0 (rows of a multiple of 256), mxfp4 as MXFP4. "F32", "F16", "BF16", "Q8_0",
    "Q4_0", "Q4_1", "TQ2_0", "TQ1_0" or "MXFP4" rounds the numbers of all matrices to that type. ends: another type for
    the embedding and the head. round_scales: with None, whether scales may be rounded to fp16, GGML's only dtype of
    scales; those that parco makes for groups are bf16, which fp16 mostly holds. Norms and biases are fp32. tokenizer:
    None leaves the text to the reader; token numbers stay.

    Raises ImportError without the library `gguf`; ValueError, with the name of the matrix, where a type cannot hold
    what is stored, for adapters, an unknown type, another architecture, variants that llama.cpp computes otherwise, and
    a tokenizer that it does not know.
    """
    target = Path(file).expanduser().resolve()
    refuse_adapters(model)
    _check(model)
    types = check_type(type, "type"), check_type(ends, "ends")
    writer = _writer(model)
    entries = _entries(model, writer.arch, types)
    _describe(writer, model, entries)
    vocabulary.write(writer, tokenizer, _config(model).vocab_size)
    temporary = target.parent / f".{target.name}.parco-{os.getpid()}"
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write(writer, entries, temporary, type is None, round_scales)
        os.replace(temporary, target)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    return target


def check_type(text: str | None, argument: str) -> str | None:
    """The type that `text` names, in capitals; ValueError, naming the argument, for none of `ggml.BLOCK`."""
    if text is not None and text.upper() not in ggml.BLOCK:
        raise ValueError(f"{argument}={text!r} is none of {', '.join(ggml.BLOCK)}")
    return text and text.upper()


def _config(model: PreTrainedModel) -> Any:
    return model.config


def _check(model: PreTrainedModel) -> None:
    """Raises ValueError for what llama.cpp would compute otherwise than Transformers."""
    config = _config(model)
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ValueError(f"the model is a {kind!r}; GGUF files are written of {', '.join(ARCHITECTURES)}")
    rope = config.rope_parameters or {}
    reasons = {
        f"hidden_act={config.hidden_act!r}": config.hidden_act != "silu",
        f"rope_type={rope.get('rope_type')!r}": rope.get("rope_type", "default") not in _ROPE,
        f"sliding_window={getattr(config, 'sliding_window', None)}": _slides(config),
        f"partial_rotary_factor={rope.get('partial_rotary_factor')}": rope.get("partial_rotary_factor", 1) != 1,
    }
    found = [text for text, wrong in reasons.items() if wrong]
    if found:
        raise ValueError(f"llama.cpp computes a {kind!r} with {found[0]} differently: no GGUF file is written of it")


def _slides(config: Any) -> bool:
    window = getattr(config, "sliding_window", None)
    return bool(window) and window < config.max_position_embeddings and getattr(config, "use_sliding_window", True)


def _writer(model: PreTrainedModel) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise GgufMissingError("written") from error
    return gguf.GGUFWriter(None, ARCHITECTURES[_config(model).model_type])


def names_of(config: Any) -> Callable[[str], str | None]:
    """llama.cpp's name of a parameter that Transformers calls so; None where it has none."""
    import gguf

    architecture = ARCHITECTURES[config.model_type]
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    return lambda name: names.get_name(name, try_suffixes=(".weight", ".bias"))


def _entries(model: PreTrainedModel, architecture: str, types: tuple[str | None, str | None]) -> list[_Entry]:
    config, written_as = _config(model), names_of(_config(model))
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    ends = tuple(f"{name}.weight" for name in (embedding_name(model), head_name(model)) if name)
    found: list[_Entry] = []
    for name, source in _sources(model):
        written = written_as(name)
        if written is None:
            raise ValueError(f"the model has a tensor {name!r}, which llama.cpp's {architecture!r} has not")
        wanted = types[1] or types[0] if name in ends else types[0]
        turned = heads.get(name.split(".")[-2], 0) if config.model_type in INTERLEAVED else 0
        try:
            kind = "F32" if len(source.shape) == 1 else wanted or ggml.type_of(_spec(source))
        except ValueError as error:
            raise ValueError(f"{name}: {error}; a type for all (such as 'Q8_0') rounds the numbers to it") from error
        found.append(_Entry(written, kind, tuple(source.shape), source, turned))
    factors = _frequency_factors(model)
    return found if factors is None else [*found, _Entry("rope_freqs.weight", "F32", tuple(factors.shape), factors, 0)]


def _sources(model: PreTrainedModel) -> Iterator[tuple[str, StoredWeight | Tensor]]:
    """Stored weights and plain parameters under the names that Transformers gives the parameters; tied ones once."""
    stored: dict[str, StoredWeight] = {}
    for name, module in model.named_modules():
        if isinstance(module, StoredWeight) and not name.startswith(tuple(f"{outer}." for outer in stored)):
            stored[name] = module
    inside = {id(parameter) for module in stored.values() for parameter in module.parameters()}
    yield from stored.items()
    for name, parameter in model.named_parameters():
        if id(parameter) not in inside:
            yield name, parameter.detach()


def _spec(source: StoredWeight | Tensor) -> Weight:
    if isinstance(source, StoredWeight):
        return source.spec
    dtypes = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return Dense((source.shape[0], source.shape[1]), dtypes[source.dtype])


def _frequency_factors(model: PreTrainedModel) -> Tensor | None:
    """By what the rotary embedding's frequencies are divided; None where by nothing."""
    config = _config(model)
    actual = next(buffer for name, buffer in model.named_buffers() if name.endswith("rotary_emb.inv_freq")).float()
    base = float(config.rope_parameters["rope_theta"])
    plain = base ** -(torch.arange(len(actual), dtype=torch.float64) / len(actual))
    factors = (plain / actual.double().cpu()).float()
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5) else factors


def _describe(writer: Any, model: PreTrainedModel, entries: list[_Entry]) -> None:
    import gguf

    config = _config(model)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(Path(config.name_or_path).name or config.model_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    (common, _), *_ = Counter(entry.type for entry in entries if len(entry.shape) == 2).most_common(1)
    names = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}
    writer.add_file_type(gguf.LlamaFileType[names.get(common, f"MOSTLY_{common}")])


def _write(writer: Any, entries: list[_Entry], file: Path, exact: bool, round_scales: bool) -> None:
    """One tensor is held at a time."""
    import gguf

    for entry in entries:
        kind = gguf.GGMLQuantizationType[entry.type]
        size, nbytes = gguf.GGML_QUANT_SIZES[kind]
        if entry.shape[-1] % size:
            raise ValueError(
                f"{entry.name}: {entry.type} has blocks of {size}, and a row has {entry.shape[-1]} numbers"
            )
        shape = (*entry.shape[:-1], entry.shape[-1] // size * nbytes)
        writer.add_tensor_info(entry.name, shape, _bytes_dtype(), torch.Size(shape).numel(), raw_dtype=kind)
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(_numbers(entry, exact, round_scales).numpy())
        for stream in writer.fout:
            stream.flush()
            os.fsync(stream.fileno())
    finally:
        writer.close()


def _bytes_dtype() -> Any:
    import numpy

    return numpy.dtype(numpy.uint8)


def _numbers(entry: _Entry, exact: bool, round_scales: bool) -> Tensor:
    """The tensor's bytes as the file holds them."""
    source = entry.source
    if isinstance(source, Tensor) and source.ndim == 1:
        found = _turned(source.float().cpu()[:, None], entry.heads).view(torch.uint8).flatten()
        return found.contiguous()
    if exact and entry.type == ggml.type_of(_spec(source)):
        try:
            found = ggml.rearranged(_spec(source), _tensors(source), round_scales)
        except ValueError as error:
            raise ValueError(f"{entry.name}: {error}") from error
    else:
        dense = source.dense() if isinstance(source, StoredWeight) else source
        found = ggml.quantized(dense.detach().cpu(), entry.type)
    return _turned(found, entry.heads).contiguous()


def _tensors(source: StoredWeight | Tensor) -> Mapping[str, Tensor]:
    if isinstance(source, Tensor):
        return {"values": source.cpu()}
    spec = source.spec
    return {
        name: tensor.detach().cpu() for name, tensor in zip(spec.tensors(), spec.unpack(*source.tensors()), strict=True)
    }


def _turned(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in llama.cpp's order: those half a head apart become neighbours."""
    if not heads:
        return rows
    return rows.reshape(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def unturned(rows: Tensor, heads: int) -> Tensor:
    """`_turned`, undone."""
    if not heads:
        return rows
    return rows.reshape(heads, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
