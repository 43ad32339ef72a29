"""Models that other libraries quantized, as parco stores them: the same codes and scales under parco's names.

A `Layout` knows the files of one library: which tensors make a matrix, and which Weight that is. Nothing is rounded
again. What a layout computes otherwise than parco will is said in `Foreign.notes`.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from parco.hub import stacks
from parco.hub.names import resolve
from parco.nn import Site, embedding_name, site, tied
from parco.nn.saved import EXPERT, clashing_names
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
    matrices, tensors, origin = _sorted_out(files, layout.parts)
    found = Foreign({}, {}, {}, tensors)
    halves: dict[str, dict[int, Matrix]] = {}
    for name in sorted(matrices):
        with _naming(origin[name], name):
            here = resolve(model, name)
            half = stacks.half(model, name) if here is None else None
            if here is None and half is None:
                raise ValueError(f"{type(model).__name__} has no such layer")
            where = half.site if half is not None else site(model, here or name)
            _drop_no_bias(name, where, tensors)
            made = layout.matrix(name, where, matrices.pop(name))
            if half is None and isinstance(made, Tensor):
                tensors[f"{name}.weight"] = made
                continue
            if isinstance(made, Tensor):
                made = Matrix(*stacks.dense(made, where))
            if half is None:
                _put(found, name, made)
                continue
            halves.setdefault(half.matrix, {})[half.place] = made
            if len(halves[half.matrix]) == half.of:
                _put(found, half.matrix, _joined(halves.pop(half.matrix)))
    if halves:
        name = min(halves)
        raise ValueError(f"{str(files[0].parent)!r}: {name}: the files have gate or up of this expert, and not both")
    stacks.order_biases(model, found.weights, tensors)
    return found._replace(tied=ties(model, found.weights, tensors), notes=layout.notes())


def _sorted_out(
    files: list[Path], parts: frozenset[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Path]]:
    """What is in the files: the tensors of every quantized matrix by the matrix's name, all others, and the file of
    each (of a matrix's first tensor).
    """
    tensors: dict[str, Tensor] = {}
    origin: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as content:
            for name in sorted(content.keys()):
                tensors[name], origin[name] = content.get_tensor(name), file
    matrices: dict[str, dict[str, Tensor]] = {}
    stacked: dict[str, dict[str, Tensor]] = {}
    for name in list(tensors):
        owners, (module, _, part) = matrices, name.rpartition(".")
        if (stack := stacks.of_stack(name, parts)) is not None:
            owners, (module, part) = stacked, stack
        elif part not in parts:
            continue
        if not module:
            raise ValueError(f"{str(origin[name])!r} has a tensor {name!r}, which is of no layer")
        owners.setdefault(module, {})[part] = tensors.pop(name)
        origin.setdefault(module, origin[name])
    for module, held in matrices.items():
        if f"{module}.weight" in tensors:
            held["weight"] = tensors.pop(f"{module}.weight")
    for parameter, held in stacked.items():
        with _naming(origin[parameter], parameter):
            for name, own in stacks.one_by_one(parameter, held):
                matrices[name], origin[name] = own, origin[parameter]
    return matrices, tensors, origin


@contextmanager
def _naming(file: Path, name: str) -> Generator[None]:
    """Puts the file and the matrix in front of a ValueError's text."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{str(file)!r}: {name}: {error}") from error


def _put(found: Foreign, name: str, made: Matrix) -> None:
    """Adds a matrix under the names by which `ParcoQuantizer` finds it."""
    found.weights[name] = made.spec
    if not isinstance(made.product, Native):
        found.products[name] = made.product
    expert = EXPERT.fullmatch(name)
    path = f"{name}.weight" if expert is None else f"{expert[1]}.{expert[2]}"
    found.tensors.update({f"{path}.{leaf}": t for leaf, t in zip(made.spec.tensors(), made.tensors, strict=True)})


def _joined(halves: Mapping[int, Matrix]) -> Matrix:
    """One expert's matrix of its halves, or of what is whole."""
    first, *others = (halves[place] for place in sorted(halves))
    for other in others:
        if other.product != first.product:
            raise ValueError(f"x is multiplied as {other.product}, and for the other half as {first.product}")
        return Matrix(*stacks.joined((first.spec, first.tensors), (other.spec, other.tensors)), first.product)
    return first


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
