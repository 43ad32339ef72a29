"""One method for all: store the matrices of a model by one Method, in place, without looking at any data.

    >>> import torch
    >>> from parco.fitting.convert import convert_
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
    >>> done = convert_(model, "int8:row")
    >>> [row.name for row in done.rows], done.before, done.after
    (['0', '2'], 65536, 17152)

For a choice per layer, made on measured time and error, use `parco.fit`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from parco import machine
from parco.fitting.methods import Method, parse
from parco.nn import (
    StoredWeight,
    blocks,
    embedding_name,
    groups,
    head_name,
    linears,
    matrix,
    pack_,
    replace_,
    share_,
    site,
    tied,
)
from parco.nn.sites import Site
from parco.products import Native, Product
from parco.products import parse as parse_product
from parco.weights import Dense, Weight, shared_tensors

Filter = Callable[[torch.nn.Module, str], bool]


@dataclass(frozen=True)
class Converted:
    """One matrix that was converted: its site name, how it is stored now, its bytes before and after (biases not
    counted, and what several share for the first of them alone), and the relative error ‖W − stored‖ / ‖W‖ (Frobenius
    norms).
    """

    name: str
    spec: Weight
    before: int
    after: int
    error: float


@dataclass(frozen=True)
class Conversion:
    """What `convert_` did, in the model's order. Prints as a table."""

    method: Method
    rows: tuple[Converted, ...]

    @property
    def before(self) -> int:
        """Bytes of the converted matrices before."""
        return sum(row.before for row in self.rows)

    @property
    def after(self) -> int:
        """Bytes of the converted matrices now."""
        return sum(row.after for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        names = max(len("matrix"), *(len(row.name) for row in self.rows))
        specs = max(len("stored as"), *(len(str(row.spec)) for row in self.rows))
        lines = [f"{'matrix':<{names}}  {'stored as':<{specs}}  {'before':>12}  {'after':>12}  {'error':>8}"]
        lines += [
            f"{row.name:<{names}}  {row.spec!s:<{specs}}  {row.before:>12,}  {row.after:>12,}  {row.error:>8.2e}"
            for row in self.rows
        ]
        share = f"{self.after / self.before:.3f} of {self.before:,} bytes"
        lines.append(f"{len(self.rows)} matrices by {self.method}: {self.after:,} bytes, {share}")
        return "\n".join(lines)


@torch.no_grad()
def convert_(
    model: torch.nn.Module,
    method: Method | str,
    filter_fn: Filter | None = None,
    product: Product | str = Native(),  # noqa: B008
) -> Conversion:
    """Store every matrix that `filter_fn` accepts by `method` (or its text, such as "int4:32"), in place.

    Linear layers, Transformers' Conv1D, embeddings and the experts of a mixture become `parco.nn` modules; biases, ties
    and compute dtypes stay. `filter_fn(module, name)` is asked once per matrix, with the module that owns it and its
    dotted name (expert matrices as `...experts.gate_up_proj[3]`); a tied matrix is converted once, for all who share
    it, when any of them is accepted. Without `filter_fn`: all linear layers inside the repeated blocks (everywhere, in
    a model that has none), but not embeddings, the head, the routers of mixtures, nor what is already stored in few
    bits.

    `product`, or its text, says how the stored matrices are multiplied: "activations(int8)" rounds x to int8, a scale
    for each row, which takes less time and adds its own error; `nn.set_product_` changes it later.

    One matrix is held twice at a time. Solvers that need statistics cannot be used here. Raises TypeError when `model`
    is no module, ValueError for an unknown method or product, for a product that a matrix so stored does not take,
    when nothing matches, and when `model` is itself the layer to convert. When an error is raised on the way the
    matrices before it stay converted.
    """
    if not isinstance(model, torch.nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    chosen, how = parse(method), parse_product(product)
    sites = _sites(model)
    if "" in sites:
        raise ValueError(
            f"model is itself a {type(model).__name__}, which cannot be replaced in place: wrap it in a module"
        )
    accepts = _default(model, sites) if filter_fn is None else filter_fn
    together = [group.members for group in groups(model) if chosen.together and group.reads_one_input]
    companions = {name: members for members in together for name in members}
    rows: list[Converted] = []
    done: set[str] = set()
    refused: set[str] = set()
    for name in sites:
        names: list[str] = []
        for each in companions.get(name, (name,)):
            # Asked anew: the first expert of a block to be converted replaced the module that owns the others.
            if each in done or each in refused:
                continue
            if not accepts(site(model, each).module, each):
                refused.add(each)
                continue
            done.update((each,) if sites[each].kind == "expert" else tied(model, each))
            names.append(each)
        if names:
            rows += _convert(model, names, chosen, how)
    if not rows:
        which = "the default filter accepts none" if filter_fn is None else "filter_fn accepted none"
        raise ValueError(f"nothing to convert in {type(model).__name__}: {which} of its {len(sites)} matrices")
    pack_(model)
    machine.release_memory()
    return Conversion(chosen, tuple(rows))


def _convert(model: torch.nn.Module, names: Sequence[str], method: Method, product: Product) -> list[Converted]:
    """Of one matrix, or of several that share what the method makes for all; its bytes count for the first."""
    rows: list[Converted] = []
    made: list[StoredWeight] = []
    originals = [matrix(model, name) for name in names]
    for name, weight, (spec, tensors) in zip(names, originals, method.each((w, None) for w in originals), strict=True):
        difference = weight - spec.dense(*tensors)
        error = float(difference.norm()) / max(float(weight.float().norm()), torch.finfo(torch.float32).tiny)
        del difference
        made.append(StoredWeight(spec, tensors, weight.dtype))
        made[-1].product = product
        elsewhere = shared_tensors(spec) if rows else set[str]()
        stored = sum(tensor.nbytes for key, tensor in spec.tensors().items() if key not in elsewhere)
        rows.append(Converted(name, spec, _bytes(model, name, weight), stored, error))
    if shared_tensors(made[0].spec):
        share_(made)
    for name, stored in zip(names, made, strict=True):
        replace_(model, name, stored)
    return rows


def _sites(model: torch.nn.Module) -> dict[str, Site]:
    """Every matrix, embeddings included, in the model's order."""
    products = linears(model)
    found: dict[str, Site] = {}
    for name, _ in model.named_modules():
        if name in products:
            found[name] = products[name]
            continue
        for inner in [path for path in products if path.startswith(f"{name}.") and path.rpartition(".")[0] == name]:
            if products[inner].kind == "expert":
                found[inner] = products[inner]
        try:
            here = site(model, name)
        except ValueError:
            continue
        found[name] = here
    return found


def _bytes(model: torch.nn.Module, name: str, weight: torch.Tensor) -> int:
    """Bytes of the matrix as it is stored now."""
    where = site(model, name)
    if where.kind == "expert":
        parameter, index = where.expert
        held = getattr(where.module, parameter)[index]
    else:
        held = where.module.weight
    return held.nbytes if isinstance(held, StoredWeight) else weight.nbytes


def _default(model: torch.nn.Module, sites: dict[str, Site]) -> Filter:
    """Linear layers of the blocks, without what the docstring of `convert_` leaves out."""
    inside = tuple(f"{path}." for path, _ in blocks(model)) or ("",)
    embedding, head = embedding_name(model), head_name(model)
    outside = {head, *(tied(model, embedding) if embedding else ())}
    outside |= {member for group in groups(model) if group.kind == "router" for member in group.members}

    def accepts(module: torch.nn.Module, name: str) -> bool:
        found = sites[name]
        held = getattr(module, found.expert[0])[found.expert[1]] if found.kind == "expert" else module.weight
        stored = isinstance(held, StoredWeight) and not isinstance(held.spec, Dense)
        return found.kind != "embedding" and name.startswith(inside) and name not in outside and not stored

    return accepts
