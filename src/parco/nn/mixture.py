"""The experts of a mixture (`nn.experts`, or Transformers' own) in one call of compiled code (csrc/experts).

Transformers sorts tokens by expert and calls two products and a dozen small operations for each: for one token that
takes as long as reading its experts' weights, of few bits longer. A call needs addresses, which are prepared once and
kept beside the module; of the experts that tokens come to, each call sees whether they are still right.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from parco import _C, machine
from parco.kernels.activations import NUMBERS
from parco.kernels.library import TYPES, undispatched
from parco.kernels.linear.prepared import kernels, prepared
from parco.kernels.rowwise import ACTIVATIONS
from parco.nn import proofs
from parco.nn.chains import dense
from parco.nn.experts import Experts
from parco.nn.linear import kind_of
from parco.nn.proofs import Unlike
from parco.nn.stored import StoredWeight
from parco.products.how import NATIVE

EXPERT_NAMES = {
    *("zeros_like", "torch", "no_grad", "nn", "F", "functional", "one_hot", "num_experts", "permute", "greater", "sum"),
    *("nonzero", "where", "linear", "gate_up_proj", "down_proj", "chunk", "act_fn", "index_add_", "to", "dtype"),
}
"""What the forward of Transformers' experts may name."""


def compiled(module: Any, activation: str, dtype: torch.dtype, rows: int) -> _C.Experts | None:
    """The call of all experts of a module for x of `dtype`, by the kernels for so many rows; None where one is of a
    kind, or somewhere, that no compiled kernel reads.
    """
    call = _C.Experts(isa=compiled_isa(), columns=module.down_proj[0].shape[0], type=TYPES[dtype])
    return call if add_experts(call, module, activation, dtype, rows) else None


def add_experts(call: _C.Experts, module: Any, activation: str, dtype: torch.dtype, rows: int) -> bool:
    """Adds all experts of a module to a call; False where no compiled kernels read them."""
    for index in range(module.num_experts):
        chains = [
            None if plan is None or not tensors[0].is_cpu else prepared(dtype, tensors, None, plan, rows)
            for plan, tensors in _matrices(module, index)
        ]
        gate_up, down = chains
        if gate_up is None or down is None:
            return False
        call.add([gate_up], down, gated=True, activation=NUMBERS[activation])
    return True


def compiled_isa() -> str:
    """The instruction set of what stands between products."""
    return "avx512" if machine.isa() == "amx" else machine.isa()


def _matrices(module: Any, index: int) -> list[tuple[str | None, tuple[Tensor, ...]]]:
    """Of gate and up, one matrix [2I, H], and of down [H, I] of an expert: the plan of the product, and the tensors."""
    found: list[tuple[str | None, tuple[Tensor, ...]]] = []
    for held in (module.gate_up_proj[index], module.down_proj[index]):
        if isinstance(held, Tensor):
            spec, tensors = dense(held.detach())
            found.append((spec.plan(NATIVE), tensors))
        else:
            found.append((held.spec.plan(held.product), held.tensors()))
    return found


def _identity(held: StoredWeight) -> Hashable:
    """What tells whether a matrix is the one that it was, multiplied as it was."""
    return held.spec, held.product, *[tensor.data_ptr() for tensor in held.tensors()]


def _plain(held: StoredWeight) -> bool:
    """Whether nobody else wants to be asked for its product."""
    state = held.__dict__
    return not (state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state)


class Prepared:
    """The calls of a module's experts for x of one dtype, and what shows that they are still right; no tensors."""

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self.dtype, self.isa, self.function = dtype, machine.isa(), module.act_fn
        self._activation = proofs.activation_of(module)
        self._stacks = self._of_stacks(module)
        self._identities = [] if self._stacks else [self._of_expert(module, i) for i in range(module.num_experts)]
        self._by_rows: dict[int, Hashable] = {}
        self._calls: dict[Hashable, _C.Experts | None] = {None: None}

    def _of_stacks(self, module: Any) -> Hashable:
        both = module.gate_up_proj, module.down_proj
        return tuple(stack.data_ptr() for stack in both if isinstance(stack, Tensor))

    def _of_expert(self, module: Any, index: int) -> Hashable:
        return _identity(module.gate_up_proj[index]), _identity(module.down_proj[index])

    def holds(self, module: Any, dtype: torch.dtype, experts: Collection[int]) -> bool:
        """Whether the calls are for x of this dtype, and these experts are as they were."""
        if dtype != self.dtype or self.isa != machine.isa() or module.act_fn is not self.function:
            return False
        if self._stacks or self._of_stacks(module):
            return self._stacks == self._of_stacks(module)
        return all(self._of_expert(module, index) == self._identities[index] for index in experts)

    def call(self, module: Any, rows: int) -> _C.Experts | None:
        """The call for about so many rows of an expert; None where no compiled kernels serve."""
        if self._activation is None:
            return None
        rows = 1 << (rows.bit_length() - 1)
        if rows not in self._by_rows:
            names = self._by_rows[rows] = self._kernels(module, rows)
            if names not in self._calls:
                self._calls[names] = compiled(module, self._activation, self.dtype, rows)
        return self._calls[self._by_rows[rows]]

    def _kernels(self, module: Any, rows: int) -> Hashable:
        """The names of all kernels, None where one of them is not compiled."""
        found: list[Hashable] = []
        for index in range(module.num_experts):
            for plan, tensors in _matrices(module, index):
                if plan is None or not tensors[0].is_cpu:
                    return None
                found.append(kernels(self.dtype, tensors, None, plan, rows))
        return None if None in found else tuple(found)


def mixed(module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor | None:
    """The weighted sum of the chosen experts' results for every row of x [T, H]; None where it takes the module."""
    fits = x.ndim == index.ndim == 2 and x.shape[0] == index.shape[0] > 0 and index.shape == weights.shape
    if not fits or x.dtype not in TYPES or index.dtype != torch.int64 or not undispatched(x, index, weights):
        return None
    if torch.is_autocast_enabled("cpu") or getattr(module, "_is_expert_parallel", False):
        return None
    asked: set[int] = set(index.view(-1).tolist()) if index.is_contiguous() else set(index.reshape(-1).tolist())
    experts = [each for each in asked if each < module.num_experts]
    if not experts or min(experts) < 0 or x.shape[1] != module.down_proj[0].shape[0]:
        return None
    if isinstance(module, Experts) and (proofs.hooked_everywhere() or not _all_plain(module, experts)):
        return None
    ready: Prepared | None = module.__dict__.get(proofs.STATE)
    if ready is None or not ready.holds(module, x.dtype, experts):
        ready = module.__dict__[proofs.STATE] = Prepared(module, x.dtype)
    call = ready.call(module, max(1, index.numel() // len(experts)))
    if call is None:
        return None
    x, index, weights = x.contiguous(), index.contiguous(), weights.float().contiguous()
    y = torch.empty_like(x)
    _C.run_experts(
        call,
        x.data_ptr(),
        index.data_ptr(),
        weights.data_ptr(),
        y.data_ptr(),
        index.shape[0],
        index.shape[1],
        torch.get_num_threads(),
    )
    return y


def _all_plain(module: Experts, experts: Collection[int]) -> bool:
    return all(_plain(stack[index]) for stack in (module.gate_up_proj, module.down_proj) for index in experts)  # pyright: ignore[reportArgumentType]


def forward(original: type[nn.Module]) -> Callable[..., Any]:
    """A forward of experts that is one call where it can be, and the original's elsewhere."""

    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        if len(inputs) == 3 and not named and not torch.compiler.is_compiling():
            y = mixed(self, *inputs)
            if y is not None:
                return y
        return original.forward(self, *inputs, **named)

    return forward


@torch.no_grad()
def experts(module: Any) -> str:
    """The activation of experts whose module computes what the compiled ones do. Raises Unlike."""
    try:
        return _proved(module)
    except BaseException:
        module.__dict__.pop(proofs.STATE, None)  # which cannot be copied with a module that is not fused
        raise


def _proved(module: Any) -> str:
    kind = kind_of(module)
    own: Any = kind.forward
    inner = getattr(own, "__wrapped__", None)
    if "forward" in module.__dict__ or (kind is not Experts and inner is None):
        raise Unlike(f"the forward of this {kind.__name__} has been replaced")
    others = set() if inner is None else {*inner.__code__.co_names, *inner.__code__.co_freevars} - EXPERT_NAMES
    if others:
        raise Unlike(f"{kind.__name__} also uses {', '.join(sorted(others))}")
    activation = proofs.activation_of(module)
    if activation is None:
        raise Unlike(f"its activation is none of {', '.join(ACTIVATIONS)}")
    first = module.gate_up_proj[0]
    x = proofs.random(4, first.shape[1], like=torch.empty(0, dtype=first.dtype, device=first.device))
    count = module.num_experts
    index = torch.stack([torch.arange(4) % count, torch.arange(1, 5) * 2 % count], dim=1)
    weights = proofs.random(4, 2, like=torch.empty(0), seed=1).softmax(-1)
    compared = 0
    for magnitude in proofs.MAGNITUDES:
        scaled = x * magnitude
        expected = kind.forward(module, scaled, index, weights)
        if not proofs.tells(expected):
            continue
        found = mixed(module, scaled, index, weights)
        if found is None:
            raise Unlike("no compiled kernel takes its matrices")
        if not proofs.apart(found, expected) < proofs.ROUNDINGS:
            raise Unlike(f"{kind.__name__} computes something else than gate, up and down of the chosen experts")
        compared += 1
    if not compared:
        raise Unlike("its results are no finite numbers, or hardly any")
    return activation
