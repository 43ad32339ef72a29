"""What is written of a weight, kept until the weight changes: one cast for all passes of an optimizer's step.

A weight is known by its storage, so it is found again from forward and backward, in graphs of torch.compile and where
FSDP2 gathers it anew. A weak reference to the storage sees to it that no other one takes its place unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from parco.training.operands import Written
from parco.training.recipe import Operand

LEAST_SEARCHED = 256
"""Entries from which those are looked for whose weights are gone."""


class _Kept(NamedTuple):
    storage: StorageWeakRef
    version: int
    written: Written


class _Store:
    """The writings of all weights, while it is open."""

    def __init__(self) -> None:
        self.opened = 0
        self.kept: dict[tuple[Any, ...], _Kept] = {}
        self._searched = LEAST_SEARCHED

    def forget(self, *_: Any) -> None:
        """What an optimizer's step calls."""
        self.kept.clear()

    def once(self, operand: Operand, weight: Tensor, transposed: bool, write: Callable[[], Written]) -> Written:
        """What `write` makes of `weight`, or made of it before."""
        itself = operand.is_plain and operand.format.dtype == weight.dtype
        if not self.opened or not operand.is_fixed or itself or weight.is_inference():
            return write()
        storage = StorageWeakRef(weight.untyped_storage())
        place = storage.cdata, weight.storage_offset(), weight.shape, weight.stride()
        key = (*place, weight.dtype, operand, transposed)
        found = self.kept.get(key)
        if found is None or found.version != weight._version or found.storage.expired():
            if len(self.kept) >= self._searched:
                self._search()
            found = self.kept[key] = _Kept(storage, weight._version, write())
        return found.written

    def _search(self) -> None:
        """Forgets what was written of weights that are no more, such as those that a parametrization makes."""
        self.kept = {key: each for key, each in self.kept.items() if not each.storage.expired()}
        self._searched = max(LEAST_SEARCHED, 2 * len(self.kept))


STORE = _Store()


@contextmanager
def once_per_step() -> Generator[None]:
    """While open, weights of prepared layers are written in few bits once for all passes of an optimizer's step:
    forward and backward, micro-batches, evaluations, and blocks whose activations are checkpointed.

    Numbers are the same to the bit. It takes the memory of each weight in the formats of its products, until
    the next step of any `torch.optim.Optimizer`, or until autograd sees the weight change in place. A loop that writes
    into `parameter.data`, which nothing sees, must not be inside. What is random (stochastic rounding, Hadamard
    transforms) or changes within a step (delayed scales) is written in each pass as ever. May be nested.
    """
    handle = register_optimizer_step_post_hook(STORE.forget)
    STORE.opened += 1
    try:
        yield
    finally:
        handle.remove()
        STORE.opened -= 1
        if not STORE.opened:
            STORE.forget()
