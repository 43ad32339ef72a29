"""The three products of one linear layer under a recipe.

What is multiplied are the numbers that decode(encode(operand)) gives, and they are summed in fp32. Between forward and
backward x is kept as grad_weight's product wants it, in the recipe's format. Random bits come from seeds that are drawn
from PyTorch's own generator of the CPU, so what a trainer saves of that is enough to resume, and nothing depends on
threads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parco import machine
from parco.formats import Float
from parco.kernels.cast import DelayedScaling
from parco.kernels.library import graph_break
from parco.kernels.linear import linear_coded_int8, linear_dense, takes_int8
from parco.training.operands import Written, estimator, has_bf16, restored, write
from parco.training.readings import Probe, Sums
from parco.training.recipe import FACTORS, Operand, Pair, ProductName, Recipe, Role

Scales = Mapping[str, DelayedScaling]
"""The delayed scales of "x", "weight" and "grad"; their tensors are updated in place."""

_HALVES = (torch.bfloat16, torch.float16)
_BYTES = Operand.parse("int8:row")
"""What `linear_coded_int8` makes of its x."""


def draw_seed() -> int:
    """A seed for Philox, from PyTorch's default generator of the CPU."""
    return int(torch.randint(1 << 62, ()))


def has_tiles(device: torch.device) -> bool:
    """Whether AMX tiles multiply there, bf16 by bf16 into fp32."""
    return device.type == "cpu" and machine.isa() == "amx"


def multiply(left: Written, right: Written, dtype: torch.dtype) -> Tensor:
    """left [M, R] · right [P, R]ᵀ in `dtype`, summed in fp32 and rounded once."""
    if has_tiles(left.device) and has_bf16(left.encoded.format) and has_bf16(right.encoded.format):
        a, b = left.in_bf16(), right.in_bf16()
        if a is not None and b is not None:
            return _multiply_bf16(*a, *b, dtype)
    a, b = left.numbers(), right.numbers()
    if a.dtype == b.dtype == dtype and dtype in _HALVES:
        if a.is_cuda:
            return a @ b.T
        if b.is_contiguous():
            return linear_dense(a.contiguous(), b)
    return (a.to(torch.float32) @ b.to(torch.float32).T).to(dtype)


def _multiply_bf16(a: Tensor, rows: Tensor | None, b: Tensor, columns: Tensor | None, dtype: torch.dtype) -> Tensor:
    """a [M, R] · b [P, R]ᵀ of bf16 numbers, the sums times the fp32 scales `rows` [M or 1, 1] and `columns` [P or 1, 1]
    one after the other, since their product may be too small a number.
    """
    scales = [each for each in (rows, None if columns is None else columns.T) if each is not None]
    y = linear_dense(a.contiguous(), b.contiguous(), dtype=torch.float32 if scales else dtype)
    for scale in scales:
        y = y.mul_(scale)
    return y.to(dtype)


def takes_bytes(pair: Pair) -> bool:
    """Whether the product takes int8 per row from its left operand's own numbers in one call."""
    right = pair.right
    return pair.left == _BYTES and not (right.reused or right.clamp) and takes_int8(right.format)


def multiply_bytes(left: Tensor, right: Written, dtype: torch.dtype) -> Tensor:
    """As `multiply`, with the rows of `left` [M, R] rounded to int8 inside the call."""
    left = left.contiguous() if left.dtype == dtype else left.to(torch.float32)
    stored = (right.tensors.get(name) for name in ("codes", "scale", "zero", "global_scale"))
    return linear_coded_int8(left, *stored, None, str(right.encoded.format), left.shape[1]).to(dtype)  # type: ignore[arg-type]


@graph_break
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
    takes readings of the operands. torch.compile does not trace it: a graph breaks here. Raises ValueError where x does
    not fit, or scales are missing, TypeError for numbers that are no floats.
    """
    if not (x.is_floating_point() and weight.is_floating_point()):
        raise TypeError(f"x is {x.dtype} and weight {weight.dtype}: both must be floating point")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x is {tuple(x.shape)}: its last dimension must be {weight.shape[1]}, as the weight's")
    if recipe.delayed and scales is None:
        raise ValueError(f"recipe {recipe} takes its scales from earlier steps: scales= are needed")
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    # Inside an autograd.Function gradients are off: whether they are wanted is seen here.
    trains = torch.is_grad_enabled()
    step = _Step(recipe, scales, probe.sums if probe is not None and (trains or training) else None)
    with torch.autocast(kind, enabled=False):
        return _Linear.apply(x, weight, bias, step, dtype, trains, training)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        step: _Step,
        dtype: torch.dtype,
        trains: bool,
        draws: bool,
    ) -> Tensor:
        recipe = step.recipe
        rows, matrix = x.detach().reshape(-1, x.shape[-1]), weight.detach()
        sum_dtype = dtype if bias is None else torch.float32
        signs = _sign_seed(recipe.output)
        right = step.write("output", 1, matrix, sign_seed=signs)
        left = None
        if takes_bytes(recipe.output) and not recipe.grad_weight.right.reused:
            y = step.multiply_bytes("output", rows, right, sum_dtype)
        else:
            left = step.write("output", 0, rows, sign_seed=signs)
            y = multiply(left, right, sum_dtype)
        if bias is not None:
            y = (y + bias.detach()).to(dtype)

        kept_x = kept_weight = None
        ctx.sign_seed = 0
        keeps = ctx.needs_input_grad[1] and rows.shape[0] > 0
        if keeps and (trains or draws):
            ctx.sign_seed = _sign_seed(recipe.grad_weight)
        if keeps and trains:
            reuses = recipe.grad_weight.right.reused
            kept_x = left if reuses else step.write("grad_weight", 1, rows, transposed=True, sign_seed=ctx.sign_seed)
        reuses = ctx.needs_input_grad[0] and recipe.grad_input.right.reused
        if trains and (reuses or (ctx.needs_input_grad[1] and recipe.output.right.dge)):
            kept_weight = right
        ctx.step, ctx.x_shape, ctx.x_dtype = step, x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.kept = [
            None if each is None else (each.encoded.format, each.encoded.shape, tuple(each.tensors))
            for each in (kept_x, kept_weight)
        ]
        ctx.save_for_backward(weight, *(t for e in (kept_x, kept_weight) if e is not None for t in e.tensors.values()))
        # y belongs to nobody else: not a view, of which autograd and FSDP2 would beware.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))  # pyright: ignore[reportPrivateUsage]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        (grad,) = grad_outputs
        step: _Step = ctx.step
        recipe = step.recipe
        weight, *saved = ctx.saved_tensors
        tensors = iter(saved)
        kept_x, kept_weight = (
            None if each is None else restored(each[0], each[1], {name: next(tensors) for name in each[2]})
            for each in ctx.kept
        )
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            signs = _sign_seed(recipe.grad_input)
            if kept_weight is not None and recipe.grad_input.right.reused:
                right = dataclasses.replace(kept_weight, turned=True)
            else:
                right = step.write("grad_input", 1, weight, transposed=True, sign_seed=signs)
            grad_x = step.product("grad_input", rows, right, ctx.x_dtype, sign_seed=signs).reshape(ctx.x_shape)
        if ctx.needs_input_grad[1]:
            if kept_x is None:
                grad_weight = torch.zeros_like(weight)  # no tokens
            else:
                right = dataclasses.replace(kept_x, turned=True) if recipe.grad_weight.right.reused else kept_x
                dtype = torch.float32 if recipe.output.right.dge else weight.dtype
                grad_weight = step.product("grad_weight", rows, right, dtype, transposed=True, sign_seed=ctx.sign_seed)
                if recipe.output.right.dge:
                    assert kept_weight is not None
                    grad_weight = grad_weight.mul_(estimator(recipe.output.right, weight, kept_weight)).to(weight.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        step.update()
        if not recipe.is_dense:
            _show_overflow(rows, grad_x, grad_weight)
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _sign_seed(pair: Pair) -> int:
    """The seed of a product's transform, 0 where it has none."""
    return draw_seed() if pair.left.hadamard else 0


def _show_overflow(grad: Tensor, *results: Tensor | None) -> None:
    """Makes one number of each result NaN where `grad` is not finite: a cast of few bits takes infinities for its
    greatest number, and a loss scaler would not see them.
    """
    if grad.numel() == 0:
        return
    least, most = torch.aminmax(grad)
    overflow = (least.to(torch.float32) - most.to(torch.float32)) * 0
    for result in results:
        if result is not None and result.numel():
            result.view(-1)[0] += overflow


class _Step:
    """One step of a layer, from forward to backward: writes its operands, with seeds of their own, and has them
    measured where the step is watched (`sums`).

    Each role keeps its delayed scale throughout, and its history moves on when the step's backward has run, once,
    whether or not the forward was computed twice (checkpointing).
    """

    def __init__(self, recipe: Recipe, scales: Scales | None, sums: Sums | None) -> None:
        self.recipe, self.scales, self.sums = recipe, scales, sums
        self.found: dict[str, tuple[Tensor, Tensor, Float]] = {}

    def write(
        self, product: ProductName, side: int, x: Tensor, *, transposed: bool = False, sign_seed: int = 0
    ) -> Written:
        """`x`, or its transpose, as the left (`side` 0) or right operand of `product`."""
        operand, role = (*self.recipe.pair(product),)[side], FACTORS[product][side]
        scale = self._scale(operand, role, x)
        seed = draw_seed() if operand.rounding == "stochastic" else 0
        written = write(operand, x, transposed=transposed, seed=seed, sign_seed=sign_seed, scale=scale)
        if self.sums is not None:
            self.sums.add(product, role, x, written, operand, transposed=transposed, sign_seed=sign_seed)
        return written

    def product(
        self,
        product: ProductName,
        left: Tensor,
        right: Written,
        dtype: torch.dtype,
        *,
        transposed: bool = False,
        sign_seed: int = 0,
    ) -> Tensor:
        """The product of `left` (its transpose where `transposed`) with a right operand that is written already."""
        if takes_bytes(self.recipe.pair(product)):
            return self.multiply_bytes(product, left, right, dtype, transposed=transposed)
        return multiply(self.write(product, 0, left, transposed=transposed, sign_seed=sign_seed), right, dtype)

    def multiply_bytes(
        self, product: ProductName, left: Tensor, right: Written, dtype: torch.dtype, *, transposed: bool = False
    ) -> Tensor:
        """`multiply_bytes`, measured where the step is watched."""
        if self.sums is not None:
            self.sums.add_bytes(product, FACTORS[product][0], left, _BYTES, transposed=transposed)
        return multiply_bytes(left.T if transposed else left, right, dtype)

    def _scale(self, operand: Operand, role: Role, x: Tensor) -> Tensor | None:
        """The scale of `operand`, which is `x` or its transpose; None where its format finds its own. The first step,
        whose history is empty, takes its own amax.
        """
        element = operand.format.element
        if not operand.is_delayed:
            return None
        assert self.scales is not None and isinstance(element, Float)
        if role not in self.found:
            amax = x.abs().amax().to(torch.float32) if x.numel() else x.new_zeros((), dtype=torch.float32)
            amax = torch.where(amax.isfinite(), amax, 0.0)  # an overflow tells nothing of the steps that follow
            state = self.scales[role]
            own = torch.where(amax > 0, amax / element.max, 1.0).reshape(1, 1)
            self.found[role] = amax, torch.where(state.history.any(), state.scale, own), element
        return self.found[role][1]

    def update(self) -> None:
        """Puts this step's amax into the histories, in place."""
        for role, (amax, _, element) in self.found.items():
            assert self.scales is not None
            state = self.scales[role]
            fresh = state.update(amax, element)
            state.scale.copy_(fresh.scale)
            state.history.copy_(fresh.history)
