"""Run a Transformers model in three parts, so that only one block needs to be in float32 at a time.

    stream = Stream(model)
    hidden = stream.enter(tokens)             # embeddings and whatever comes before the first block
    with stream.block(i) as run:              # for every block
        hidden = run(hidden)
    logits = stream.leave(hidden)             # final norm and head

Nothing about the architecture is assumed but a list of blocks that take and return hidden states: the parts before and
after are run by the model's own forward with the blocks replaced by stubs, which also record the masks and position
embeddings that the model hands to each block. Parameters are cast to float32 while in use, and the very same storage is
put back afterwards; buffers (rotary frequencies) keep their type. The alternative, hooks on a whole forward, needs the
whole model in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from parco.nn import StoredWeight
from parco.nn.blocks import blocks

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Stop(Exception):
    """Ends a forward early, once everything wanted has been seen."""


class Stream:
    """A model in three parts. The model must be in eval mode and is unchanged between calls."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = [name for name, _ in blocks(model)]
        self._tuples: bool | None = None
        self._arguments: dict[tuple[int, int], list[Arguments]] = {}

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks as they are now (a caller may have replaced modules inside them)."""
        return [module for _, module in blocks(self.model)]

    def enter(self, tokens: Tensor) -> Tensor:
        """Hidden states [B, T, H] float32 that the first block receives for tokens [B, T]."""
        seen: list[Tensor] = []
        with self.outer():
            self._record(tokens, seen)
        return seen[0].float()

    @contextmanager
    def block(self, index: int) -> Generator[Callable[[Tensor], Tensor]]:
        """Block `index` in float32 while the context lasts: a function of hidden states [B, T, H], differentiable in
        them.

        A backward pass belongs inside the context: it reads the parameters again.
        """
        module = self.blocks[index]

        def run(hidden: Tensor) -> Tensor:
            args, kwargs = self._arguments_for(index, hidden)
            out = module(hidden, *args, **kwargs)
            return out[0] if isinstance(out, tuple) else out

        with in_float32(module):
            yield run

    def leave(self, hidden: Tensor) -> Tensor:
        """Logits [B, T, V] float32 for the hidden states [B, T, H] that the last block returned."""

        def stub(index: int, state: Tensor) -> Tensor:
            return hidden if index == 0 else state

        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long)
        with self.outer(), self._stubs(lambda index, state, args, kwargs: stub(index, state)):
            return self.model(input_ids=tokens, use_cache=False).logits.float()

    def _arguments_for(self, index: int, hidden: Tensor) -> Arguments:
        batch, length = hidden.shape[:2]
        if (batch, length) not in self._arguments:
            with self.outer():
                self._record(torch.zeros(batch, length, dtype=torch.long), [])
        return self._arguments[batch, length][index]

    def _record(self, tokens: Tensor, seen: list[Tensor]) -> None:
        recorded: list[Arguments] = []
        count = len(self.names)

        def stub(index: int, state: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            recorded.append((args, kwargs))
            if index == 0:
                seen.append(state)
            if index == count - 1:
                raise _Stop
            return state

        with self._stubs(stub), torch.no_grad(), suppress(_Stop):
            self.model(input_ids=tokens, use_cache=False)
        self._arguments[tokens.shape[0], tokens.shape[1]] = recorded

    @contextmanager
    def _stubs(self, stub: Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]) -> Generator[None]:
        """Blocks whose forward is `stub(index, hidden, args, kwargs)`. The first call of all runs the block too, to see
        whether this architecture's blocks return tuples.
        """

        def forward_of(index: int, module: nn.Module) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                if self._tuples is None:
                    with torch.no_grad(), in_float32(module):
                        self._tuples = isinstance(type(module).forward(module, hidden_states, *args, **kwargs), tuple)
                out = stub(index, hidden_states, args, kwargs)
                return (out,) if self._tuples else out

            return forward

        current = self.blocks
        try:
            for index, module in enumerate(current):
                module.forward = forward_of(index, module)
            yield
        finally:
            for module in current:
                module.__dict__.pop("forward", None)

    @contextmanager
    def outer(self) -> Generator[None]:
        """Everything outside the blocks in float32."""
        inside = {id(parameter) for module in self.blocks for parameter in module.parameters()}
        with in_float32(self.model, skip=inside):
            yield


@contextmanager
def in_float32(module: nn.Module, skip: set[int] | None = None) -> Generator[None]:
    """Dense floating parameters of `module` as float32, compute of stored weights too; what was there is put back.

    skip: ids of parameters to leave alone. Weight tensors of StoredWeight keep their storage types.
    """
    skip = skip or set()
    stored = [part for part in module.modules() if isinstance(part, StoredWeight)]
    packed = {id(tensor) for part in stored for tensor in part.parameters()}
    changed: list[tuple[nn.Parameter, Tensor]] = []
    computed = [(part, part.dtype) for part in stored if not any(id(tensor) in skip for tensor in part.parameters())]
    try:
        for parameter in module.parameters():
            cast = parameter.is_floating_point() and parameter.dtype != torch.float32
            if cast and id(parameter) not in packed and id(parameter) not in skip:
                changed.append((parameter, parameter.data))
                parameter.data = parameter.data.float()
        for part, _ in computed:
            part.dtype = torch.float32
        yield
    finally:
        for parameter, data in changed:
            parameter.data = data
        for part, dtype in computed:
            part.dtype = dtype


def windows_in_batches(hidden: Tensor, rows: int) -> Iterator[slice]:
    """Slices of `rows` windows each over hidden or token windows [W, ...]."""
    for start in range(0, hidden.shape[0], rows):
        yield slice(start, min(start + rows, hidden.shape[0]))
