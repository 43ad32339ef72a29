"""What is written of a weight, kept until the weight changes: one cast for all passes of an optimizer's step.

A weight is known by its place in memory and by its bits, which are read again each time, so what was kept is found from
forward and backward, in graphs of torch.compile and where FSDP2 gathers the weight anew, and is not that of another
weight, whoever wrote there (but for a collision of 64 bits). A weak reference to the storage says when a weight is
gone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from parco.formats import ScaleE8M0
from parco.kernels.cast.fingerprint import fingerprint
from parco.training.operands import Written
from parco.training.recipe import Operand


class _Kept(NamedTuple):
    storage: StorageWeakRef
    bits: int
    written: Written


class _Store:
    """The writings of all weights, while it is open."""

    def __init__(self) -> None:
        self.opened = 0
        self.kept: dict[tuple[Any, ...], _Kept] = {}

    def forget(self, *_: Any) -> None:
        """What an optimizer's step calls."""
        self.kept.clear()

    def once(self, operand: Operand, weight: Tensor, transposed: bool, write: Callable[[], Written]) -> Written:
        """What `write` makes of `weight`, or made of it before."""
        bits = fingerprint(weight) if self.opened and _pays(operand) else None
        if bits is None:
            return write()
        storage = StorageWeakRef(weight.untyped_storage())
        place = storage.cdata, weight.storage_offset(), weight.shape, weight.stride()
        key = (*place, weight.dtype, operand, transposed)
        found = self.kept.get(key)
        if found is None or found.bits != bits:
            # Those of weights that are no more, such as a parametrization makes, go now.
            self.kept = {key: each for key, each in self.kept.items() if not each.storage.expired()}
            found = self.kept[key] = _Kept(storage, bits, write())
        return found.written


def _pays(operand: Operand) -> bool:
    """Whether what is written stays the same, and takes longer than reading the weight: a cast to 16 bits, and one to
    MX, whose scales are those of 32 neighbours, is hardly more than that.
    """
    return operand.is_fixed and not operand.is_plain and not isinstance(operand.format.scale, ScaleE8M0)


STORE = _Store()


@contextmanager
def once_per_step() -> Generator[None]:
    """While open, weights of prepared layers on the CPU are written in few bits once for all passes of an optimizer's
    step: forward and backward, micro-batches, evaluations, and blocks whose activations are checkpointed.

    Numbers are the same to the bit, whatever changes a weight and when: each pass reads it to see. It takes the memory
    of each weight in the formats of its products, until the next step of any `torch.optim.Optimizer`. Written in each
    pass as ever is what is random (stochastic rounding, Hadamard transforms) or changes within a step (delayed scales),
    and what takes no longer than the reading: 16 bits and MX. May be nested.
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
