"""Reads a GGUF file into a Transformers model: its own codes and scales where a Weight holds them (see `ggml`), its
configuration and its tokenizer out of the file's metadata.

What `gguf` writes with a tokenizer comes back: the same architectures, the same types, queries and keys in
Transformers' order again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from parco.formats import DTYPE_NAMES
from parco.hub import ggml, vocabulary
from parco.hub.foreign import Foreign, plain, ties
from parco.hub.gguf import ARCHITECTURES, INTERLEAVED, GgufMissingError, names_of, unturned
from parco.nn import site
from parco.weights import Dense, Weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MAGIC = b"GGUF"
_FACTORS = "rope_freqs.weight"
_HIGHEST, _LOWEST = 4.0, 1.0
"""Llama 3's factors: beyond the first no frequency is divided, below the second all are."""


class GgufModel(NamedTuple):
    """What a file holds: the model, its configuration, the narrowest dtype of its plain numbers, and the tokenizer."""

    foreign: Foreign
    config: Any
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase


def read_gguf(file: Path) -> GgufModel:
    """The model in a GGUF file of a Llama (Mistral), Qwen2 or Qwen3, in the types F32, F16, BF16, Q8_0, Q4_0, Q4_1,
    TQ2_0, TQ1_0 and MXFP4.

    Raises ImportError without the library `gguf`; ValueError, in one line that names the file (and the tensor), for
    one that is truncated or no GGUF file, another architecture, another type, tensors that do not fit, and a tokenizer
    that parco does not know.
    """
    fields, tensors = _open(file)
    try:
        config = _config(fields, tensors)
        tokenizer = vocabulary.read(fields)
        model = plain(config)
        weights, numbers = _numbers(model, tensors)
    except ValueError as error:
        raise ValueError(f"{str(file)!r}: {error}") from error
    dtype = _dtype(weights, numbers)
    _keep_narrow(weights, numbers, dtype)
    return GgufModel(Foreign(weights, {}, ties(model, weights, numbers), numbers), config, dtype, tokenizer)


class _Tensor(NamedTuple):
    """One tensor of the file: its type, its shape as torch has it, and its bytes, uint8 [rows, bytes of a row]."""

    type: str
    shape: tuple[int, ...]
    data: Tensor


def _open(file: Path) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """Metadata and tensors, memory-mapped."""
    try:
        import gguf
    except ImportError as error:
        raise GgufMissingError("read") from error
    try:
        reader = gguf.GGUFReader(file, "c")  # torch wants memory that could be written
        fields = {name: field.contents() for name, field in reader.fields.items()}
        found = {tensor.name: _tensor(tensor) for tensor in reader.tensors}
    except Exception as error:  # the library checks nothing: a damaged file raises whatever NumPy makes of it
        with file.open("rb") as stream:
            ours = stream.read(len(_MAGIC)) == _MAGIC
        state = "is truncated, or newer than the library gguf that is installed" if ours else "is no GGUF file"
        raise ValueError(f"{str(file)!r} {state}: copy or download it again") from error
    if str(fields.get("GGUF.version")) not in ("2", "3") or reader.byte_order != "I":
        raise ValueError(f"{str(file)!r} is a GGUF file of another byte order or version; parco reads versions 2 and 3")
    return fields, found


def _tensor(tensor: Any) -> _Tensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    data = torch.from_numpy(tensor.data.view("uint8").reshape(shape[0] if len(shape) > 1 else 1, -1))
    return _Tensor(tensor.tensor_type.name, shape, data)


def _config(fields: Mapping[str, Any], tensors: Mapping[str, _Tensor]) -> Any:
    from transformers import AutoConfig

    architecture = fields.get("general.architecture")
    kinds = {theirs: ours for ours, theirs in reversed(ARCHITECTURES.items())}
    if architecture not in kinds:
        raise ValueError(f"it is a {architecture!r}, and parco reads {', '.join(kinds)}")

    def value(key: str, default: Any = None, kind: type = int) -> Any:
        found = fields.get(f"{architecture}.{key}", default)
        if type(found) not in (int, kind) or not 0 < found < math.inf:
            raise ValueError(f"its {architecture}.{key} is {found!r}; a positive number ({kind.__name__}) is needed")
        return found

    heads = value("attention.head_count")
    head = value("attention.key_length", value("embedding_length") // heads)
    known = {
        "expert_count": (0,), "attention.value_length": (head,), "rope.dimension_count": (head,),
        "rope.scaling.type": ("none", "linear"),
    }  # fmt: skip
    for key, values in known.items():
        found = fields.get(f"{architecture}.{key}", values[0])
        if found not in values:
            raise ValueError(f"its {architecture}.{key} is {found!r}, which parco does not read")
    if "token_embd.weight" not in tensors:
        raise ValueError("it has no tensor 'token_embd.weight'")
    settings = {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": value("embedding_length"),
        "num_hidden_layers": value("block_count"),
        "intermediate_size": value("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": head,
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": _shortest(value("attention.layer_norm_rms_epsilon", kind=float)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        **{
            f"{name}_token_id": fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in vocabulary.SPECIAL.items()
        },
    }
    if kinds[architecture] == "llama":
        settings["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    base = _shortest(value("rope.freq_base", 10000.0, float))
    scaling = _shortest(value("rope.scaling.factor", 1.0, float))
    settings["rope_parameters"] = _rope(base, scaling, tensors.get(_FACTORS), head, settings)
    try:
        return AutoConfig.for_model(kinds[architecture], **settings)
    except Exception as error:  # of kinds of Transformers' own, in several lines
        raise ValueError(f"its metadata make no {kinds[architecture]}: {' '.join(str(error).split())}") from error


def _shortest(single: float) -> float:
    """The number of fewest digits that is `single` in fp32, in which files keep what was 1e-6 once."""
    import numpy

    return float(str(numpy.float32(single)))


def _rope(
    base: float, scaling: float, factors: _Tensor | None, head: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The rotary embedding whose frequencies are divided by `scaling` or by `factors`."""
    plainly = {"rope_type": "default", "rope_theta": base}
    if factors is None:
        return plainly if scaling == 1 else {"rope_type": "linear", "rope_theta": base, "factor": scaling}
    spec, numbers = ggml.weight(factors.data, factors.type, factors.shape[-1])
    divided = spec.dense(*numbers)[0]
    most = float(divided.max())
    if torch.allclose(divided, torch.full_like(divided, most), rtol=1e-4):
        return {"rope_type": "linear", "rope_theta": base, "factor": most}
    for power in range(5, 20):
        found = {
            "rope_type": "llama3", "rope_theta": base, "factor": most, "low_freq_factor": _LOWEST,
            "high_freq_factor": _HIGHEST, "original_max_position_embeddings": 1 << power,
        }  # fmt: skip
        if torch.allclose(divided, _divisors(found, head, settings), rtol=1e-3):
            return found
    raise ValueError(f"its {_FACTORS!r} are none that Transformers computes: parco reads linear and Llama 3's")


def _divisors(rope: dict[str, Any], head: int, settings: Mapping[str, Any]) -> Tensor:
    """By what Llama 3's rotary embedding divides its frequencies, fp32 [head / 2]."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    changed: dict[str, Any] = {**settings, "head_dim": head, "rope_parameters": rope}
    config = LlamaConfig(**changed)
    divided, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return rope["rope_theta"] ** -(torch.arange(head // 2, dtype=torch.float32) / (head // 2)) / divided


def _numbers(model: PreTrainedModel, tensors: Mapping[str, _Tensor]) -> tuple[dict[str, Weight], dict[str, Tensor]]:
    """Module name -> Weight of what is quantized, and every tensor under the name by which it is loaded."""
    config: Any = model.config
    written = names_of(config)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    left = dict(tensors)
    left.pop(_FACTORS, None)
    weights: dict[str, Weight] = {}
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        theirs = written(name)
        if theirs is None or theirs not in left:
            raise ValueError(f"it has no tensor {theirs!r}, the model's {name}")
        given = left.pop(theirs)
        if given.shape != tuple(parameter.shape):
            raise ValueError(f"{theirs}: it is {given.shape}, and the metadata says {tuple(parameter.shape)}")
        turned = heads.get(name.split(".")[-2], 0) if config.model_type in INTERLEAVED else 0
        try:
            spec, numbers = _matrix(given, turned)
        except ValueError as error:
            raise ValueError(f"{theirs}: {error}") from error
        module, _, leaf = name.rpartition(".")
        if isinstance(spec, Dense):
            found[name] = numbers[0].reshape(parameter.shape)
            continue
        if leaf != "weight" or site(model, module).kind == "conv1d":
            raise ValueError(f"{theirs}: it is of the type {given.type}, and only matrices are quantized")
        weights[module] = spec
        found |= {f"{name}.{part}": tensor for part, tensor in zip(spec.tensors(), numbers, strict=True)}
    if left:
        raise ValueError(f"it has a tensor {next(iter(left))!r}, which {type(model).__name__} has not")
    return weights, found


def _matrix(given: _Tensor, heads: int) -> tuple[Weight, tuple[Tensor, ...]]:
    if len(given.shape) == 1:
        spec, numbers = ggml.weight(given.data, given.type, given.shape[0])
        if heads:
            numbers = (unturned(numbers[0].reshape(-1, 1), heads).contiguous(),)
        return spec, numbers
    return ggml.weight(unturned(given.data, heads).contiguous(), given.type, given.shape[1])


def _dtype(weights: Mapping[str, Weight], tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The narrowest dtype that holds every plain number of the file, bf16 before fp16."""
    owned = tuple(f"{name}.weight." for name in weights)
    numbers = [tensor for name, tensor in tensors.items() if not name.startswith(owned)]
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(tensor.to(dtype).float(), tensor.float()) for tensor in numbers):
            return dtype
    return torch.float32


def _keep_narrow(weights: dict[str, Weight], tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Makes dense matrices that would be widened to `dtype` Weights of their own."""
    for name, tensor in list(tensors.items()):
        if tensor.ndim == 2 and name.endswith(".weight") and tensor.dtype.itemsize < dtype.itemsize:
            spec = Dense((tensor.shape[0], tensor.shape[1]), DTYPE_NAMES[tensor.dtype])
            weights[name.removesuffix(".weight")] = spec
            tensors[f"{name}.values"] = tensors.pop(name)
