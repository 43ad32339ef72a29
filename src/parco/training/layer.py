"""One linear layer under a recipe, as operations of PyTorch's: torch.compile takes it whole, forward and backward.

All seeds of a step are drawn before its products, from PyTorch's own generator of the CPU, so what a trainer saves of
that is enough to resume. `draw_seeds` says of itself that it changes a tensor, which every draw is given, so a compiler
neither swaps two draws nor takes them for one. Delayed scales are changed in place, after the products of backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parco.formats import Float
from parco.kernels.cast import DelayedScaling, Encoded
from parco.kernels.library import LIBRARY, graph_break
from parco.training.once import STORE
from parco.training.operands import Written, restored, tensors_of
from parco.training.products import Kept, Step, backward, forward, scale_of
from parco.training.readings import Probe, Sums
from parco.training.recipe import Recipe, Role, known

Scales = Mapping[str, DelayedScaling]
"""The delayed scales of "x", "weight" and "grad"; their tensors are updated in place."""

_ORDER = torch.zeros(1)
"""What every draw of seeds is said to change."""

LIBRARY.define("draw_seeds(Tensor(a!) order, int count) -> Tensor")
LIBRARY.define(
    "recipe_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? seeds, Tensor[] scales, str recipe, ScalarType dtype)"
    " -> Tensor"
)
LIBRARY.define(
    "recipe_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? seeds, Tensor[] scales, str recipe,"
    " ScalarType dtype, bool keeps_x, bool keeps_weight) -> Tensor[]"
)
LIBRARY.define(
    "recipe_backward(Tensor grad, Tensor weight, Tensor? x, Tensor[] kept, Tensor? seeds, Tensor[] scales, str recipe,"
    " ScalarType x_dtype, ScalarType bias_dtype, bool[] needs, bool keeps_x, bool keeps_weight) -> Tensor[]"
)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    recipe: Recipe,
    scales: Scales | None = None,
    training: bool = False,
    probe: Probe | None = None,
) -> Tensor:
    """y [..., N] = x [..., K] · weight [N, K]ᵀ + bias, forward and backward as `recipe` says.

    y has the dtype of x, under autocast that of autocast; the bias is added in fp32. Gradients have the dtypes of what
    they belong to. `scales` are needed by recipes with delayed scales. With `training` seeds are drawn without
    gradients too, as for the first forward of a layer whose activations are checkpointed. A `probe` that is watched
    takes readings of the operands, and breaks torch.compile's graph on the steps on which it does. Raises ValueError
    where x does not fit, or scales are missing, TypeError for numbers that are no floats.
    """
    if not (x.is_floating_point() and weight.is_floating_point()):
        raise TypeError(f"x is {x.dtype} and weight {weight.dtype}: both must be floating point")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x is {tuple(x.shape)}: its last dimension must be {weight.shape[1]}, as the weight's")
    if recipe.delayed and scales is None:
        raise ValueError(f"recipe {recipe} takes its scales from earlier steps: scales= are needed")
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    draws = training or torch.is_grad_enabled()
    count = len(recipe.seeds) if draws else recipe.output_seeds
    seeds = torch.ops.parco.draw_seeds.default(_ORDER, count) if count else None
    own = [tensor for role in recipe.delayed for tensor in scales[role]] if scales is not None else []
    if draws and probe is not None and probe.sums is not None:
        return _watched(x, weight, bias, seeds, recipe.key, dtype, probe.sums, own)
    return torch.ops.parco.recipe_linear.default(x, weight, bias, seeds, own, recipe.key, dtype)


@graph_break
def _watched(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seeds: Tensor | None,
    key: str,
    dtype: torch.dtype,
    sums: Sums,
    scales: list[Tensor],
) -> Tensor:
    return _Linear.apply(x, weight, bias, seeds, key, dtype, sums, *scales)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """The products by their operations, or where they are watched by themselves."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        seeds: Tensor | None,
        key: str,
        dtype: torch.dtype,
        sums: Sums | None,
        *scales: Tensor,
    ) -> Tensor:
        recipe, needs = known(key), ctx.needs_input_grad
        # What a plain operand is made of is kept itself where it has the dtype already.
        plain = recipe.grad_weight.right.is_plain and not recipe.grad_weight.right.reused
        itself = plain and recipe.grad_weight.right.format.dtype == x.dtype and sums is None
        keeps = needs[1] and x.numel() > 0
        keeps_weight = (needs[0] and recipe.grad_input.right.reused) or (needs[1] and recipe.output.right.dge > 0)
        ctx.keeps = keeps and not itself, keeps_weight
        given = (x, weight, bias, seeds, list(scales), key, dtype, *ctx.keeps)
        with torch._C._AutoDispatchBelowAutograd():  # pyright: ignore[reportPrivateUsage]
            if sums is None:
                y, *kept = torch.ops.parco.recipe_forward.default(*given)
            else:
                y, *kept = _forward(*given, sums=sums)
        ctx.save_for_backward(weight, x if keeps and itself else None, seeds, *kept)
        ctx.key, ctx.scales, ctx.sums = key, scales, sums
        ctx.dtypes = x.dtype, torch.float32 if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        weight, x, seeds, *kept = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        given: Any = (*grad_outputs, weight, x, kept, seeds, list(ctx.scales), ctx.key, *ctx.dtypes, needs, *ctx.keeps)
        if ctx.sums is None:
            found = iter(torch.ops.parco.recipe_backward.default(*given))
        else:
            found = iter(_backward(*given, sums=ctx.sums))
        grads = [next(found) if wanted else None for wanted in needs]
        amax = {role: each[0] for role, each in zip(_forward_roles(known(ctx.key)), kept, strict=False)}
        for role, (state, element) in _states(known(ctx.key), ctx.scales).items():
            fresh = state.update(next(found)[0] if role == "grad" else amax[role], element)
            state.scale.copy_(fresh.scale)
            state.history.copy_(fresh.history)
        return (*grads, None, None, None, None, *(None for _ in ctx.scales))


def _states(recipe: Recipe, scales: Sequence[Tensor]) -> dict[Role, tuple[DelayedScaling, Float]]:
    """The delayed scales of a recipe's operands, and the elements that they are of."""
    found: dict[Role, tuple[DelayedScaling, Float]] = {}
    for role, state in zip(recipe.delayed, zip(scales[::2], scales[1::2], strict=True), strict=True):
        form = recipe.delayed_format(role)
        assert form is not None and isinstance(form.element, Float)
        found[role] = DelayedScaling(*state), form.element
    return found


def _forward_roles(recipe: Recipe) -> list[Role]:
    """The operands whose delayed scale forward finds; what it found is the first that it keeps."""
    return [role for role in recipe.delayed if role != "grad"]


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seeds: Tensor | None,
    scales: list[Tensor],
    key: str,
    dtype: torch.dtype,
    keeps_x: bool,
    keeps_weight: bool,
    sums: Sums | None = None,
) -> list[Tensor]:
    """y [..., N], `scale_of` each of x and weight whose scale is delayed, and the tensors of the operands to keep."""
    recipe = known(key)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        rows, matrix = x.detach().reshape(-1, x.shape[-1]), weight.detach()
        operands = {"x": rows, "weight": matrix}
        states = _states(recipe, scales)
        found: dict[Role, Tensor] = {
            role: scale_of(operands[role], states[role][1], states[role][0]) for role in _forward_roles(recipe)
        }
        step = Step(recipe, _numbers(seeds), _of_formats(found), sums)
        own = dtype if bias is None else torch.float32
        y, kept = forward(step, rows, matrix, own, keeps_x=keeps_x, keeps_weight=keeps_weight)
        y = y if bias is None else (y + bias.detach()).to(dtype)
        tensors = [t for each in kept if each is not None for t in each.tensors.values()]
        others = (x, weight, *kept.weight.tensors.values()) if kept.weight is not None and STORE.opened else (x, weight)
        # y belongs to nobody else: not a view, of which autograd and FSDP2 would beware.
        y = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))  # pyright: ignore[reportPrivateUsage]
        return [y, *found.values(), *(_alone(tensor, *others) for tensor in tensors)]


def _backward(
    grad: Tensor,
    weight: Tensor,
    x: Tensor | None,
    kept: Sequence[Tensor],
    seeds: Tensor | None,
    scales: list[Tensor],
    key: str,
    x_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    needs: Sequence[bool],
    keeps_x: bool,
    keeps_weight: bool,
    sums: Sums | None = None,
) -> list[Tensor]:
    """Those of grad_x, grad_weight and grad_bias that one `needs`, and `scale_of` grad where its scale is delayed."""
    recipe = known(key)
    with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
        rows = grad.reshape(-1, grad.shape[-1])
        (outputs, columns), rest = weight.shape, iter(kept)
        found: dict[Role, Tensor] = {role: next(rest) for role in _forward_roles(recipe)}
        if "grad" in recipe.delayed:
            state, element = _states(recipe, scales)["grad"]
            found["grad"] = scale_of(rows, element, state)
        kept_x = kept_weight = None
        if x is not None:
            values = {"values": x.reshape(-1, columns)}
            kept_x = Written(Encoded(recipe.grad_weight.right.format, (rows.shape[0], columns), values))
        if keeps_x:
            kept_x = restored(recipe.grad_weight.right, _kept_shape(recipe, rows.shape[0], columns), rest)
        if keeps_weight:
            kept_weight = restored(recipe.output.right, (outputs, columns), rest)
        step = Step(recipe, _numbers(seeds), _of_formats(found), sums)
        dtypes = x_dtype, weight.dtype, bias_dtype
        grads = backward(step, rows, weight, Kept(kept_x, kept_weight), dtypes, needs)
        if needs[0]:
            grads[0] = grads[0].reshape(*grad.shape[:-1], columns)
        return grads + [found[role] for role in recipe.delayed if role == "grad"]


def _kept_shape(recipe: Recipe, tokens: int, columns: int) -> tuple[int, int]:
    """The matrix as which x is kept for `grad_weight`."""
    return (tokens, columns) if recipe.turns_x else (columns, tokens)


def _numbers(seeds: Tensor | None) -> list[int]:
    return [] if seeds is None else seeds.tolist()


def _of_formats(found: Mapping[Role, Tensor]) -> dict[Role, Tensor]:
    """The scales as formats take them."""
    return {role: each[1].reshape(1, 1) for role, each in found.items()}


def _alone(tensor: Tensor, *others: Tensor) -> Tensor:
    """`tensor` in rows, its memory its own: an operation returns none of its arguments, nor what it keeps for later."""
    given = {other.untyped_storage().data_ptr() for other in others}
    return tensor.clone() if tensor.untyped_storage().data_ptr() in given else tensor.contiguous()


def _fake_linear(
    x: Tensor, weight: Tensor, bias: object, seeds: object, scales: object, key: str, dtype: Any
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: object,
    seeds: object,
    scales: object,
    key: str,
    dtype: torch.dtype,
    keeps_x: bool,
    keeps_weight: bool,
) -> list[Tensor]:
    recipe = known(key)
    outputs, columns = weight.shape
    specs = []
    if keeps_x:
        specs += tensors_of(recipe.grad_weight.right, _kept_shape(recipe, x.numel() // columns, columns)).values()
    if keeps_weight:
        specs += tensors_of(recipe.output.right, (outputs, columns)).values()
    found = [x.new_empty(2, dtype=torch.float32) for _ in _forward_roles(recipe)]
    y = _fake_linear(x, weight, bias, seeds, scales, key, dtype)
    return [y, *found, *(x.new_empty(spec.shape, dtype=spec.dtype) for spec in specs)]


def _fake_backward(
    grad: Tensor,
    weight: Tensor,
    x: object,
    kept: object,
    seeds: object,
    scales: object,
    key: str,
    x_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    needs: Sequence[bool],
    keeps_x: bool,
    keeps_weight: bool,
) -> list[Tensor]:
    outputs, columns = weight.shape
    made = (
        ((*grad.shape[:-1], columns), x_dtype),
        ((outputs, columns), weight.dtype),
        ((outputs,), bias_dtype),
    )
    grads = [grad.new_empty(shape, dtype=dtype) for (shape, dtype), wanted in zip(made, needs, strict=True) if wanted]
    return grads + [grad.new_empty(2, dtype=torch.float32)] * ("grad" in known(key).delayed)


def _differentiable(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seeds: Tensor | None,
    scales: list[Tensor],
    key: str,
    dtype: torch.dtype,
) -> Tensor:
    if torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias, seeds, key, dtype, None, *scales)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():  # pyright: ignore[reportPrivateUsage]
        return torch.ops.parco.recipe_linear.default(x, weight, bias, seeds, scales, key, dtype)


def _drawn(order: Tensor, count: int) -> Tensor:
    return torch.randint(1 << 62, (count,), device="cpu")


def _undifferentiated(*given: Any) -> Tensor:
    return _forward(*given, keeps_x=False, keeps_weight=False)[0]


_OPERATIONS: tuple[tuple[str, Any, Any], ...] = (
    ("draw_seeds", _drawn, lambda order, count: torch.empty(count, dtype=torch.int64, device="cpu")),
    ("recipe_linear", _undifferentiated, _fake_linear),
    ("recipe_forward", _forward, _fake_forward),
    ("recipe_backward", _backward, _fake_backward),
)
"""What runs on every device, and what where graphs are traced."""

for name, run, fake in _OPERATIONS:
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"parco::{name}", fake, lib=LIBRARY)
LIBRARY.impl("recipe_linear", _differentiable, "Autograd")
