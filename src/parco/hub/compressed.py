"""Models as vLLM's and llm-compressor's package compressed-tensors stores them, in and out.

The package takes part nowhere: what it writes are plain tensors. Of a module's matrix W [N, K] these are

| tensor | holds |
| --- | --- |
| weight_packed | int32 [N, ⌈K·bits/32⌉]: a stream of codes, lowest bit first; uint8 for floats of 4 and 6 bits |
| weight | int8 [N, K], the integers themselves, or float8_e4m3fn |
| weight_scale | one for each block: fp16, bf16, fp32, e4m3 (NVFP4), e8m0 in bytes (MX) |
| weight_zero_point | int8, or int32 packed down the rows, where weight_packed is int32 |
| weight_global_scale | fp32 [1] by which NVFP4's scales are divided; parco's multiplies them |
| weight_shape | int64 [2] |

A code is an integer plus 2^(bits−1), here as there, and the streams are the same: rows are cut to whole bytes, or
filled up to whole words. Source: the package's `compressors/`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from parco.formats import Format, Integer, ScaleE4M3
from parco.hub import schemes
from parco.hub.foreign import Matrix, given, is_in_order, plain, shaped
from parco.hub.save import MARK, refuse_foreign, whole, write_settings, write_weights
from parco.hub.schemes import Scheme
from parco.kernels.cast import pack, unpack
from parco.nn import Site, saved, site
from parco.products import Native, Product
from parco.weights import Quantized, Weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SCALE = "weight_scale"
_PACKED = "weight_packed"
_ZERO = "weight_zero_point"
_GLOBAL = "weight_global_scale"
_INPUTS = ("input_scale", "input_zero_point", "input_global_scale")
_OUTPUTS = ("output_scale", "output_zero_point")


class CompressedTensors:
    """The layout that a `quantization_config` of the method "compressed-tensors" describes. ValueError where parco
    cannot read it.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._schemes = schemes.schemes(settings)
        self._ignored = schemes.names(settings.get("ignore") or [])
        self._rounded: Counter[tuple[str, str]] = Counter()
        self._others: list[str] = []
        if settings.get("kv_cache_scheme"):
            self._others.append("keys and values are cached in few bits there, and in the model's dtype here")

    @property
    def parts(self) -> frozenset[str]:
        return frozenset((_SCALE, _PACKED, _ZERO, _GLOBAL, "weight_shape", "weight_g_idx", *_INPUTS, *_OUTPUTS))

    def matrix(self, name: str, where: Site, parts: Mapping[str, Tensor]) -> Matrix:
        scheme = schemes.choose(self._schemes, name, where.module)
        if scheme is None or schemes.is_ignored(self._ignored, name, where.module):
            raise ValueError(f"{next(iter(parts))}: config.json says that this layer is not quantized")
        if where.kind not in ("linear", "embedding"):
            raise ValueError(f"{next(iter(parts))}: the layer is a {type(where.module).__name__}, and no Linear")
        spec = Quantized(schemes.format_of(scheme.weights, given(parts, _SCALE).dtype), where.shape)
        tensors = _tensors(spec, parts, scheme.format == schemes.INT_PACKED)
        return Matrix(spec, tuple(tensors[part] for part in spec.tensors()), self._product(spec, scheme))

    def _product(self, spec: Quantized, scheme: Scheme) -> Product:
        if scheme.outputs is not None:
            self._rounded["outputs", schemes.rounding(scheme.outputs)] += 1
        found = schemes.product_of(scheme.activations)
        if found is None:
            return Native()
        if not isinstance(found, str):
            if spec.takes(found):
                return found
            found = "int8, per token"
        self._rounded["inputs", found] += 1
        return Native()

    def notes(self) -> tuple[str, ...]:
        rounded = (
            f"the {what} of {count} layers are rounded there ({how}), and kept as they are here"
            for (what, how), count in sorted(self._rounded.items())
        )
        return *rounded, *self._others


def _tensors(spec: Quantized, parts: Mapping[str, Tensor], packed: bool) -> dict[str, Tensor]:
    """A module's tensors as parco stores them; `packed` says whether integers are."""
    form, (rows, columns) = spec.format, spec.shape
    counts = form.block.counts(spec.shape)
    if "weight_shape" in parts and parts["weight_shape"].tolist() != [rows, columns]:
        raise ValueError(f"weight_shape: it is {parts['weight_shape'].tolist()}, and the layer is {rows}x{columns}")
    if "weight_g_idx" in parts and not is_in_order(parts["weight_g_idx"], form.block.columns or columns):
        raise ValueError("weight_g_idx: its groups are no neighbouring columns; quantize without actorder='group'")
    found = {"codes": _codes(form, parts, rows, columns, packed)}
    scale = _by_block(parts, _SCALE, form, counts)
    if isinstance(form.scale, ScaleE4M3) and scale.dtype != torch.float8_e4m3fn:
        raise ValueError(f"{_SCALE}: scales are {scale.dtype}, and those of {form} must be torch.float8_e4m3fn")
    found["scale"] = scale
    if isinstance(form.scale, ScaleE4M3):
        found["scale"] = found["scale"].view(torch.uint8)
        found["global_scale"] = 1 / shaped(parts, _GLOBAL, (1,), torch.float32)
        if not 0 < found["global_scale"].item() < torch.inf:
            raise ValueError(f"{_GLOBAL}: it is {parts[_GLOBAL].item()}, and must be a positive number")
    if form.is_asymmetric:
        found["zero"] = _zero(form, parts, rows, counts, packed)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _codes(form: Format, parts: Mapping[str, Tensor], rows: int, columns: int, packed: bool) -> Tensor:
    bits, element = form.bits, form.element
    nbytes = -(-columns * bits // 8)
    if isinstance(element, Integer):
        if packed:
            words = shaped(parts, _PACKED, (rows, -(-columns * bits // 32)), torch.int32)
            return words.contiguous().view(torch.uint8)[:, :nbytes]
        integers = shaped(parts, "weight", (rows, columns), torch.int8).to(torch.int16) + element.offset
        if bool((integers < 0).any() or (integers >= element.codes).any()):
            raise ValueError(f"weight: integers of {bits} bits lie within ±{element.offset}; these do not")
        return pack(integers.to(torch.uint8), bits)
    if bits == 8:
        return shaped(parts, "weight", (rows, columns), torch.float8_e4m3fn).view(torch.uint8)
    return shaped(parts, _PACKED, (rows, nbytes), torch.uint8)


def _zero(form: Format, parts: Mapping[str, Tensor], rows: int, counts: tuple[int, int], packed: bool) -> Tensor:
    """The code that stands for 0, uint8 of the scales' shape."""
    assert isinstance(form.element, Integer)
    if packed:
        words = shaped(parts, _ZERO, (-(-rows * form.bits // 32), counts[1]), torch.int32)
        stream = words.t().contiguous().view(torch.uint8)
        return unpack(stream[:, : -(-rows * form.bits // 8)], form.bits, rows).t()
    zero = _by_block(parts, _ZERO, form, counts)
    return (zero.to(torch.int16) + form.element.offset).to(torch.uint8)


def _by_block(parts: Mapping[str, Tensor], name: str, form: Format, counts: tuple[int, int]) -> Tensor:
    """The tensor of one number for each block, of the shape `counts`; the package leaves out ones at the end."""
    found = given(parts, name)
    shapes = [counts, *([counts[:1]] if counts[1] == 1 else []), *([()] if counts == (1, 1) else [])]
    if tuple(found.shape) not in shapes:
        raise ValueError(f"{name}: it is {tuple(found.shape)}, and {form} has {' or '.join(map(str, shapes))} here")
    return found.reshape(counts)


def _parts(spec: Quantized, tensors: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    """A Weight's tensors as compressed-tensors stores them."""
    form, columns = spec.format, spec.shape[1]
    codes, scale = tensors["codes"], tensors["scale"]
    found = {_SCALE: scale.flatten() if scheme.weights["strategy"] == "tensor" else scale}
    if isinstance(form.element, Integer):
        half = form.element.offset
        if scheme.format == schemes.INT:
            found["weight"] = (unpack(codes, form.bits, columns).to(torch.int16) - half).to(torch.int8)
        else:
            found |= {_PACKED: _words(codes), "weight_shape": torch.tensor(spec.shape)}
        if form.is_asymmetric and scheme.format == schemes.INT:
            found[_ZERO] = (tensors["zero"].to(torch.int16) - half).to(torch.int8)
        elif form.is_asymmetric:
            found[_ZERO] = _words(pack(tensors["zero"].t().contiguous(), form.bits)).t().contiguous()
        return found
    found["weight" if form.bits == 8 else _PACKED] = codes.view(torch.float8_e4m3fn) if form.bits == 8 else codes
    if isinstance(form.scale, ScaleE4M3):
        found[_SCALE] = scale.view(torch.float8_e4m3fn)
        found[_GLOBAL] = 1 / tensors["global_scale"]
    return found


def _words(stream: Tensor) -> Tensor:
    """uint8 [N, B] as int32 [N, ⌈B/4⌉], zeros at the end."""
    return nn.functional.pad(stream, (0, -stream.shape[1] % 4)).flatten().view(torch.int32).reshape(len(stream), -1)


def save_compressed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike[str],
    *,
    dense: bool = False,
) -> Path:
    """Saves the model as compressed-tensors does, for vLLM and Transformers with that package; returns the folder,
    which is whole or absent.

    Codes and scales are those that are stored: integers of 2 to 8 bits by tensor, row or group, with zero points or
    without, fp8_e4m3, nvfp4, mxfp4, mxfp6_e2m3 and mxfp8_e4m3. What is multiplied by activations(int8) is written as
    int-quantized, whose inputs are rounded per token. dense: whether a matrix that compressed-tensors has no format
    for is written in the model's dtype instead of refused. A folder that parco saved is replaced once the new one is
    whole; of any other only an empty one is. Scales keep their dtype; a reader may round fp32 ones to the model's, as
    Transformers does without CompressedTensorsConfig(dequantize=True).

    Raises ValueError, with the name of the matrix, for one without a format there, for experts and for Conv1D; what
    `save` raises for the folder and the disk.
    """
    target = Path(folder).expanduser().resolve()
    refuse_foreign(target)
    content, settings = compressed(model, dense)
    with whole(target, sum(tensor.nbytes for tensor in content.values())) as temporary:
        write_weights(temporary, content, marks=MARK)
        write_settings(temporary, model, tokenizer, settings)
    return target


def compressed(model: PreTrainedModel, dense: bool) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of `model` and its `quantization_config` for compressed-tensors, None where nothing is stored."""
    content = saved.tensors_to_save(model)
    content.pop(saved.HINT, None)
    description, bare = saved.describe(model), plain(model.config)
    found: dict[str, Scheme] = {}
    read: set[str] = set()  # a factor that several layers hold is read for each of them, and dropped at the end
    for name, spec in description.weights.items():
        if saved.EXPERT.fullmatch(name):
            raise ValueError(f"{name} is an expert of a mixture, which parco does not write for compressed-tensors")
        content.pop(f"{name}.weight")
        kept = {leaf: _kept_as(f"{name}.weight.{leaf}", description.shared) for leaf in spec.tensors()}
        tensors = {leaf: content[path] for leaf, path in kept.items()}
        read.update(kept.values())
        product = description.products.get(name, Native())
        where = site(bare, name)
        try:
            scheme = _scheme(spec, product, where, name in description.tied.values())
        except ValueError as error:
            if not dense or where.kind == "conv1d":
                remedy = "" if where.kind == "conv1d" else "; dense=True (--dense) writes it in the model's dtype"
                raise ValueError(f"{name}: {spec}: {error}{remedy}") from error
            content[f"{name}.weight"] = spec.dense(*tensors.values(), dtype=saved.compute_dtype(model))
            continue
        assert isinstance(spec, Quantized)
        found[name] = scheme
        content |= {f"{name}.{part}": tensor for part, tensor in _parts(spec, tensors, scheme).items()}
    written = {name: tensor for name, tensor in sorted(content.items()) if name not in read}
    return written, _settings(bare, found) if found else None


def _kept_as(path: str, shared: Mapping[str, str]) -> str:
    """The name under which the tensor `path` is kept: its own, or that in the first layer which holds the factor."""
    for factor, owner in shared.items():
        if path.startswith(f"{factor}."):
            return owner + path.removeprefix(factor)
    return path


def _scheme(spec: Weight, product: Product, where: Site, is_shared: bool) -> Scheme:
    if where.kind == "conv1d":
        raise ValueError("compressed-tensors knows linear layers, and this was a Conv1D")
    if is_shared:
        raise ValueError("head and embedding share it, which compressed-tensors does only with dense ones")
    if not isinstance(spec, Quantized):
        raise ValueError("compressed-tensors has matrices of one part, all of whose numbers are stored")
    scheme = schemes.scheme_of(spec.format, product)
    size = scheme.weights.get("group_size")
    if size is not None and spec.shape[1] % size:
        raise ValueError(f"compressed-tensors cuts rows into whole groups, and {spec.shape[1]} columns have some left")
    return scheme


def _settings(bare: PreTrainedModel, found: Mapping[str, Scheme]) -> dict[str, Any]:
    """The `quantization_config`: one group for each scheme, by class where there is one and all are linear layers."""
    groups: dict[str, list[str]] = {}
    kinds: dict[str, Scheme] = {}
    for name, scheme in found.items():
        groups.setdefault(str(scheme), []).append(name)
        kinds[str(scheme)] = scheme
    others = [name for name, module in bare.named_modules() if isinstance(module, nn.Linear) and name not in found]
    only = len(groups) == 1 and all(isinstance(bare.get_submodule(name), nn.Linear) for name in found)
    written = {
        f"group_{index}": {
            "targets": ["Linear"] if only else names,
            "weights": dict(kinds[text].weights) | {"dynamic": False},
            "input_activations": None if kinds[text].activations is None else dict(kinds[text].activations or {}),
            "output_activations": None,
            "format": kinds[text].format,
        }
        for index, (text, names) in enumerate(groups.items())
    }
    formats = {scheme.format for scheme in kinds.values()}
    return {
        "config_groups": written,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": others,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
