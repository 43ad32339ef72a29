"""Mixtures of experts (`nn.experts`, or Transformers' own) for compiled code (csrc/experts).

Transformers sorts tokens by expert and calls two products and a dozen small operations for each: for one token that
takes as long as reading its experts' weights, of few bits longer. A call needs addresses, which are prepared for an
expert when a token first comes to it, and kept beside the module with what shows that they are still right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from parco import _C, machine
from parco.kernels.activations import NUMBERS
from parco.kernels.library import PLAIN, TYPES, undispatched
from parco.kernels.linear.prepared import prepared
from parco.kernels.rowwise import ACTIVATIONS
from parco.nn import proofs
from parco.nn.chains import chain, chains, dense
from parco.nn.experts import EXPERT_PARAMETERS, Experts, Gating, expert_bias, gating
from parco.nn.linear import kind_of
from parco.nn.parts import Block, Mixture
from parco.nn.proofs import Unlike
from parco.nn.stored import StoredWeight
from parco.products.how import NATIVE

EXPERT_NAMES = {
    *("zeros_like", "torch", "no_grad", "nn", "F", "functional", "one_hot", "num_experts", "permute", "greater", "sum"),
    *("nonzero", "where", "linear", "gate_up_proj", "down_proj", "chunk", "act_fn", "index_add_", "to", "dtype"),
}
MIXTURE_NAMES = {
    *("shape", "view", "reshape", "torch", "empty_like", "uniform_", "training", "jitter_noise", "F", "sigmoid"),
}
ROUTER_NAMES = {
    *("reshape", "hidden_dim", "F", "nn", "functional", "linear", "weight", "torch", "softmax", "float", "topk"),
    *("top_k", "sum", "norm_topk_prob", "to", "dtype"),
}
"""What the forwards of Transformers' experts, of the block that holds them (besides its children) and of a router may
name.
"""

IMPLEMENTATIONS = (None, "eager", "batched_mm", "grouped_mm")
"""Of Transformers' experts: those that compute what its experts' own forward does, on a CPU."""

ROWS = (1, 5, 9, 16, 48, 1024)
"""Numbers of rows from which products may have other kernels (`kernels.linear.dense`)."""


def plain(experts: Any) -> bool:
    """Whether nothing else is asked of experts than a result: no other implementation, no hooks on their function."""
    function = experts.act_fn
    implementation = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    return (
        not getattr(experts, "_is_expert_parallel", False)
        and implementation in IMPLEMENTATIONS
        and (not isinstance(function, nn.Module) or _unhooked(function))
    )


def _unhooked(module: nn.Module) -> bool:
    state = module.__dict__
    return not (state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state)


def expert(experts: Any, index: int, activation: str, dtype: torch.dtype, rows: int) -> _C.Block | None:
    """One expert for x of `dtype`, by the kernels for so many rows; None where it is of a kind, or somewhere, that no
    compiled kernel reads.
    """
    products: list[_C.Chain] = []
    for name in EXPERT_PARAMETERS:
        held = getattr(experts, name)[index]
        if isinstance(held, Tensor):
            spec, tensors = dense(held.detach())
            plan = spec.plan(NATIVE)
        else:
            plan, tensors = held.spec.plan(held.product), held.tensors()
        if plan is None or not all(type(each) in PLAIN and each.is_cpu for each in tensors):
            return None
        bias = expert_bias(experts, name, index)
        product = prepared(dtype, tensors, None if bias is None else bias.detach(), plan, rows)
        if product is None:
            return None
        products.append(product)
    gate_up, down = products
    return _block([gate_up], down, activation, True, gating(experts) or Gating())


def _block(gate_up: list[_C.Chain], down: _C.Chain, activation: str, gated: bool, how: Gating) -> _C.Block:
    return _C.Block(
        isa=machine.isa(),
        gate_up=gate_up,
        down=down,
        gated=gated,
        activation=NUMBERS[activation],
        limit=how.limit,
        slope=how.slope,
        raised=how.raised,
    )


def block(found: Block, activation: str, dtype: torch.dtype) -> _C.Block | None:
    """A feed-forward block of linear layers, for one row; None as of an expert."""
    gate_up, down = chains(found.gate_up, dtype), chains((found.down,), dtype)
    if gate_up is None or down is None:
        return None
    return _block(gate_up, down[0], activation, found.is_gated, Gating())


def mixture(found: Mixture, activation: str, normalized: bool, dtype: torch.dtype) -> _C.Mixture | None:
    """A mixture with its router, for one row; None where no compiled kernel reads one of its matrices."""
    weight: Tensor = found.router.weight
    if weight.dtype != dtype or _stacks(found.experts, dtype) is None:
        return None
    blocks = [expert(found.experts, index, activation, dtype, 1) for index in range(found.experts.num_experts)]
    router = chain(*dense(weight), None, dtype)
    shared = None if found.shared is None else block(found.shared, activation, dtype)
    gate = None if found.shared_gate is None else chains((found.shared_gate,), dtype)
    held = [each for each in blocks if each is not None]
    if len(held) < len(blocks) or router is None:
        return None
    if (found.shared is not None and shared is None) or (found.shared_gate is not None and gate is None):
        return None
    return _C.Mixture(
        blocks=held,
        router=router,
        choices=found.router.top_k,
        normalized=normalized,
        shared=shared,
        shared_gate=gate[0] if gate else None,
    )


def _stacks(experts: Any, dtype: torch.dtype) -> tuple[Hashable, ...] | None:
    """What tells whether matrices in 3-D parameters, and biases of those that are stored one by one, are what they
    were; None where they are no plain parameters of this dtype on a CPU.
    """
    stored = isinstance(experts, Experts)
    found: list[Hashable] = []
    for name in EXPERT_PARAMETERS:
        name = f"{name}_bias" if stored else name
        stack = experts._parameters.get(name)
        if stored and stack is None:
            continue
        if type(stack) is not nn.Parameter or not stack.is_cpu or stack.dtype != dtype or not stack.is_contiguous():
            return None
        found.append((stack.data_ptr(), stack.shape, stack.stride()))
    return tuple(found)


def _identity(held: StoredWeight) -> Hashable:
    """The same of a stored matrix, and of how it is multiplied."""
    return held.spec, held.product, *[(type(each), each.data_ptr(), each.shape) for each in held.tensors()]


class State:
    """What is known of a module's experts: what computes each, by dtype, kernels and number, with what shows that it
    still does. No tensors.
    """

    def __init__(self, experts: Any) -> None:
        self.function, self.activation = _function(experts), proofs.activation_of(experts)
        self.blocks: dict[Hashable, tuple[Hashable, _C.Block | None]] = {}


def _function(experts: Any) -> Hashable:
    return experts.act_fn, getattr(experts.act_fn, "approximate", None), experts.__dict__.get("gating")


def _blocks(experts: Any, numbers: Collection[int], dtype: torch.dtype, rows: int) -> list[_C.Block] | None:
    """What computes these experts for about so many rows of each; None where one takes the module."""
    stacks = _stacks(experts, dtype)
    if stacks is None:
        return None
    state: State | None = experts.__dict__.get(proofs.STATE)
    if state is None or state.function != _function(experts):
        state = experts.__dict__[proofs.STATE] = State(experts)
    if state.activation is None:
        return None
    isa, rows = machine.isa(), max(each for each in ROWS if each <= rows)
    found: list[_C.Block] = []
    for number in numbers:
        identity = stacks
        if isinstance(experts, Experts):
            both: list[StoredWeight] = [getattr(experts, name)[number] for name in EXPERT_PARAMETERS]
            if not all(map(_unhooked, both)):
                return None
            identity = *stacks, *map(_identity, both)
        key = dtype, isa, rows, number
        kept = state.blocks.get(key)
        if kept is None or kept[0] != identity:
            kept = state.blocks[key] = identity, expert(experts, number, state.activation, dtype, rows)
        if kept[1] is None:
            return None
        found.append(kept[1])
    return found


def mixed(experts: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor | None:
    """The weighted sum of the chosen experts' results for every row of x [T, H]; None where it takes the module."""
    fits = x.ndim == index.ndim == 2 and x.shape[0] == index.shape[0] and index.shape == weights.shape
    if not fits or not index.numel() or x.dtype not in TYPES or index.dtype != torch.int64:
        return None
    if not undispatched(x, index, weights) or torch.is_autocast_enabled("cpu") or proofs.hooked_everywhere():
        return None
    asked: set[int] = set(index.flatten().tolist())
    numbers = [each for each in asked if each < experts.num_experts]
    if not numbers or min(asked) < 0 or not plain(experts) or x.shape[1] != experts.down_proj[0].shape[0]:
        return None
    blocks = _blocks(experts, numbers, x.dtype, max(1, index.numel() // len(numbers)))
    if blocks is None:
        return None
    x, index, weights = x.contiguous(), index.contiguous(), weights.float().contiguous()
    y = torch.empty_like(x)
    _C.run_experts(
        blocks,
        numbers,
        x.data_ptr(),
        index.data_ptr(),
        weights.data_ptr(),
        y.data_ptr(),
        index.shape[0],
        index.shape[1],
        torch.get_num_threads(),
    )
    return y


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
    finally:
        module.__dict__.pop(proofs.STATE, None)  # which cannot be copied with a module that is not fused


def _proved(module: Any) -> str:
    kind = kind_of(module)
    own: Any = kind.forward
    inner = getattr(own, "__wrapped__", None)
    if "forward" in module.__dict__ or (kind is not Experts and inner is None):
        raise Unlike(f"the forward of this {kind.__name__} has been replaced")
    if kind is not Experts and (gating(module) != Gating() or module.is_transposed or module.has_bias):
        raise Unlike("Transformers' layout of them is read by no compiled kernel: convert them first")
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

    distance = proofs.alike(
        lambda x: kind.forward(module, x, index, weights), lambda x: _found(mixed(module, x, index, weights)), x
    )
    if not distance < proofs.most_apart(MIXTURE_ROUNDINGS, x.dtype):
        raise Unlike(f"{kind.__name__} computes something else than gate, up and down of the chosen experts")
    return activation


def _found(result: Tensor | None) -> Tensor:
    if result is None:
        raise Unlike("no compiled kernel takes its matrices, or more is asked of it than a result")
    return result


MIXTURE_ROUNDINGS = 3.0
"""As `proofs.ROUNDINGS`: results of experts, their weights and their sum are rounded one by one in the unfused path."""


@torch.no_grad()
def weighs(found: Mixture, activation: str) -> bool:
    """Whether the weights of chosen experts are made to add up to 1, of a mixture that computes what the compiled one
    does. Raises Unlike.
    """
    module, weight = found.module, found.router.weight
    proofs.require(module, MIXTURE_NAMES | set(dict(module.named_children())), set())
    proofs.require(found.router, ROUTER_NAMES, {"weight"})
    gate = getattr(found.shared_gate, "weight", None)
    parameters = [each for each in (weight, gate) if type(each) is nn.Parameter]
    most = proofs.most_apart(MIXTURE_ROUNDINGS, weight.dtype)
    with proofs.disturbed(parameters, 2 / weight.shape[1] ** 0.5):
        rows = proofs.random(64, weight.shape[1], like=weight)
        clear = rows[_clear(rows @ weight.T, found.router.top_k)].unsqueeze(1)
        for normalized in (True, False):
            run = functools.partial(_run, mixture(found, activation, normalized, weight.dtype))
            if all(proofs.alike(proofs.unfused(module), run, row[None]) < most for row in clear):
                return normalized
    raise Unlike(f"{type(module).__name__} chooses or weighs experts otherwise")


def _clear(logits: Tensor, choices: int) -> list[int]:
    """Of rows of logits those three in which the last that is chosen is the furthest ahead of the next."""
    ordered = logits.float().sort(dim=-1, descending=True).values
    if choices == ordered.shape[-1]:
        return [0, 1, 2]
    return (ordered[:, choices - 1] - ordered[:, choices]).topk(3).indices.tolist()


def _run(compiled: _C.Mixture | None, x: Tensor) -> Tensor:
    """Of one row [.., H]."""
    y = torch.empty_like(x)
    if compiled is None:
        raise Unlike("no compiled kernel takes its matrices")
    _C.run_mixture(compiled, x.data_ptr(), y.data_ptr(), torch.get_num_threads())
    return y
