"""Layers that hold one factor together, and its product with their input, computed once.

A factor is shared by being the same module, `right` of `q_proj.weight`, `k_proj.weight` and `v_proj.weight`: a state
dict names it three times, moving, copying and sharding see one Parameter, and files hold it once (`saved`). This is how
tied embeddings are held; a buffer at attention's own level was rejected, because models' code asks q, k and v one by
one, and each has to work by itself.

What one input makes of the factor is kept until every layer has asked for it, or the input is gone. It is used only
where nothing else can tell: without gradients, outside of tracing and of inference mode (whose tensors do not count
their changes), for the very tensor and the very numbers of the factor, unchanged, and once for each layer, so that a
second pass computes anew.

Unchanged is what PyTorch counts as such, by a tensor's version. It counts neither what is written through `x.data` nor
what NumPy or other code writes into the memory of x. Whoever does that between the layers of one pass gives the later
ones what x was before; a pass that is over leaves nothing, whatever is written after it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from parco.kernels.library import undispatched
from parco.weights import shared_parts

if TYPE_CHECKING:
    from parco.nn.stored import StoredWeight


class Narrow:
    """What a shared factor made of the last input, and the left factors that have taken it, of so many `takers` that
    hold it. Copies begin empty.
    """

    __slots__ = ("__weakref__", "_kept", "takers")

    def __init__(self, takers: int = 1) -> None:
        self.takers = takers
        self._kept: tuple[weakref.ref[Tensor], object, Tensor, set[int]] | None = None

    def __reduce__(self) -> tuple[type[Narrow], tuple[int]]:
        return Narrow, (self.takers,)

    def take(self, x: Tensor, state: object, taker: int) -> Tensor | None:
        """What x became, where it is kept, under the same `state`, and `taker` has not had it. The last one that takes
        it leaves nothing.
        """
        kept = self._kept
        if kept is None or kept[0]() is not x or kept[1] != state or taker in kept[3]:
            return None
        kept[3].add(taker)
        if len(kept[3]) == self.takers:
            self._kept = None
        return kept[2]

    def keep(self, x: Tensor, state: object, taker: int, narrow: Tensor) -> None:
        """Hold `narrow` as long as x lives and a taker has not had it."""
        own = weakref.ref(self)

        def drop(reference: weakref.ref[Tensor]) -> None:
            here = own()
            if here is not None and here._kept is not None and here._kept[0] is reference:
                here._kept = None

        self._kept = (weakref.ref(x, drop), state, narrow, {taker})


def multiply(weight: StoredWeight, x: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias for a LowRank weight whose right factor is Shared: by its own left one alone, where another layer
    has multiplied x by the shared one. The same bits as `weight.spec.apply`.
    """
    parts: dict[str, Any] = weight._modules  # pyright: ignore[reportPrivateUsage]
    left, right, product = parts["left"], parts["right"], weight.product
    if torch.compiler.is_compiling() or not undispatched(x) or x.is_inference():
        return weight.spec.apply(x, *weight.tensors(), bias=bias, product=product)
    tensors = right.tensors()
    state = x._version, product, [(each.data_ptr(), each.is_inference() or each._version) for each in tensors]
    narrow = right.narrow.take(x, state, id(left))
    if narrow is None:
        narrow = right.spec.apply(x, *tensors, product=product)
        right.narrow.keep(x, state, id(left), narrow)
    return left.spec.apply(narrow, *left.tensors(), bias=bias, product=product)


def share_(weights: Sequence[StoredWeight]) -> None:
    """Makes the Shared parts of the first weight those of all, in place; what the others held there is dropped.

    Raises ValueError where the others have other Shared parts than the first.
    """
    first, *others = weights
    parts = dict(shared_parts(first.spec))
    for other in others:
        if not parts or dict(shared_parts(other.spec)) != parts:
            raise ValueError(f"share_: {other.spec} and {first.spec} have no shared parts that are alike")
        for path in parts:
            put_(other, path, first.get_submodule(path))


def put_(module: nn.Module, path: str, part: nn.Module) -> None:
    """Makes `part`, that of another weight, the submodule `path` of `module`."""
    if module.get_submodule(path) is part:
        return
    parent, _, leaf = path.rpartition(".")
    module.get_submodule(parent).add_module(leaf, part)
    narrow = getattr(part, "narrow", None)
    if isinstance(narrow, Narrow):
        narrow.takers += 1
