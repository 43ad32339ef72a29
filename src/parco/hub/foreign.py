"""Models that other libraries quantized, as parco stores them: the same codes and scales under parco's names.

A `Layout` knows the files of one library: which tensors make a matrix, and which Weight that is. Nothing is rounded
again. What a layout computes otherwise than parco will is said in `Foreign.notes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from parco.hub.names import resolve
from parco.nn import Site, embedding_name, site, tied
from parco.nn.saved import clashing_names
from parco.products import Native, Product
from parco.weights import Weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Matrix(NamedTuple):
    """What one quantized matrix becomes: a Weight, its tensors, and how x is multiplied by it."""

    spec: Weight
    tensors: tuple[Tensor, ...]
    product: Product = Native()


class Foreign(NamedTuple):
    """A whole model: module name -> Weight, Product (where it is not the native one) and the module whose Weight it
    shares; every tensor under the name by which `ParcoQuantizer` loads it; and what is computed otherwise here.
    """

    weights: dict[str, Weight]
    products: dict[str, Product]
    tied: dict[str, str]
    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


class Layout(Protocol):
    """How one library stores quantized matrices. `parts` are the last names of tensors that only those have."""

    @property
    def parts(self) -> frozenset[str]: ...

    def matrix(self, name: str, where: Site, parts: Mapping[str, Tensor]) -> Matrix | Tensor:
        """The matrix of the module `name` made of its tensors, its own `weight` among them where there is one; a dense
        Tensor where parco has no Weight for it. ValueError, beginning with the tensor's last name, for what does not
        fit.
        """
        ...

    def notes(self) -> tuple[str, ...]:
        """What the matrices that were made so far are computed with there, and not here."""
        ...


def plain(config: Any) -> PreTrainedModel:
    """The architecture of `config` without numbers, and without what a quantizer would change."""
    from transformers import AutoModelForCausalLM

    bare = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(bare)


def read(files: list[Path], layout: Layout, model: PreTrainedModel) -> Foreign:
    """What the safetensors `files` hold, for the architecture `model`. Raises ValueError, in one line that names the
    file and the tensor, for what does not fit the layout or the architecture.
    """
    matrices: dict[str, dict[str, Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    origin: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as content:
            for name in sorted(content.keys()):
                tensors[name], origin[name] = content.get_tensor(name), file
    for name in [name for name in tensors if name.rpartition(".")[2] in layout.parts]:
        module, _, part = name.rpartition(".")
        if not module:
            raise ValueError(f"{str(origin[name])!r} has a tensor {name!r}, which is of no layer")
        matrices.setdefault(module, {})[part] = tensors.pop(name)
    for module, parts in matrices.items():
        if f"{module}.weight" in tensors:
            parts["weight"] = tensors.pop(f"{module}.weight")
    weights: dict[str, Weight] = {}
    products: dict[str, Product] = {}
    for module, parts in sorted(matrices.items()):
        file = origin[f"{module}.{next(iter(parts))}"]
        here = resolve(model, module)
        if here is None:
            raise ValueError(
                f"{str(file)!r} has a quantized matrix {module!r}, and {type(model).__name__} has no such layer"
                " (experts of mixtures are not read)"
            )
        try:
            where = site(model, here)
            _drop_no_bias(module, where, tensors)
            made = layout.matrix(module, where, parts)
        except ValueError as error:
            raise ValueError(f"{str(file)!r}: {module}: {error}") from error
        if isinstance(made, Tensor):
            tensors[f"{module}.weight"] = made
            continue
        weights[module] = made.spec
        if not isinstance(made.product, Native):
            products[module] = made.product
        tensors |= {f"{module}.weight.{leaf}": t for leaf, t in zip(made.spec.tensors(), made.tensors, strict=True)}
    return Foreign(weights, products, ties(model, weights, tensors), tensors, layout.notes())


def _drop_no_bias(name: str, where: Site, tensors: dict[str, Tensor]) -> None:
    """Drops the zeros that some libraries add as the bias of a layer that has none; ValueError for other numbers."""
    has_bias = isinstance(getattr(where.module, "bias", None), Tensor)
    if where.kind == "embedding" or has_bias or f"{name}.bias" not in tensors:
        return
    if bool(tensors.pop(f"{name}.bias").any()):
        raise ValueError("bias: the architecture has none here, and the file has one that is not zero")


def given(parts: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor of that name; ValueError, beginning with it, if there is none."""
    if name not in parts:
        raise ValueError(f"{name}: the file has {', '.join(sorted(parts))} of this layer, and not this one")
    return parts[name]


def shaped(parts: Mapping[str, Tensor], name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
    """The tensor, if it is of this shape and one of these dtypes; ValueError if not."""
    found = given(parts, name)
    if tuple(found.shape) != shape or found.dtype not in dtypes:
        wanted = " or ".join(map(str, dtypes))
        raise ValueError(f"{name}: it is {found.dtype} {tuple(found.shape)}, and must be {wanted} {shape}")
    return found


def is_in_order(groups: Tensor, size: int) -> bool:
    """Whether column k belongs to group k // size, for [K] numbers of groups."""
    return torch.equal(groups.long(), torch.arange(len(groups)) // size)


def ties(model: PreTrainedModel, weights: Mapping[str, Weight], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Modules that share a stored embedding: those that the architecture ties to it and the files have nothing of."""
    name = embedding_name(model)
    if name is None or name not in weights:
        return {}
    others = [other for other in tied(model, name) if other not in weights and f"{other}.weight" not in tensors]
    return {other: name for other in others if other != name}


def build(foreign: Foreign, config: Any, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, as Transformers loads what parco saved, and what Transformers says of the loading."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from parco.hub.quantizer import ParcoConfig

    texts = {name: str(spec) for name, spec in foreign.weights.items()}
    products = {name: str(product) for name, product in foreign.products.items()}
    stored = ParcoConfig(texts, foreign.tied, str(dtype).removeprefix("torch."), products=products)
    if foreign.weights:
        config.quantization_config = stored.to_dict()
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
    assert not clashing_names(texts).keys() & foreign.tensors.keys(), "a matrix is there twice"
    made: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return made.from_pretrained(None, config=config, state_dict=foreign.tensors, dtype=dtype, output_loading_info=True)
