"""The three products of one linear layer under a recipe.

What is multiplied are the numbers that decode(encode(operand)) gives, and they are summed in fp32. Between forward and
backward x is kept as grad_weight's product wants it, in the recipe's format. What is random comes from seeds, so
nothing depends on threads.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parco import machine
from parco.formats import Float
from parco.kernels.cast import DelayedScaling, Encoded
from parco.kernels.library import TYPES
from parco.kernels.linear import linear_both, linear_coded_int8, linear_dense, takes_both, takes_int8
from parco.training.once import STORE
from parco.training.operands import Written, estimator, has_bf16, write
from parco.training.readings import Sums
from parco.training.recipe import FACTORS, SIGNS, Operand, Pair, ProductName, Recipe, Role

_HALVES = (torch.bfloat16, torch.float16)
_BYTES = Operand.parse("int8:row")
"""What `linear_coded_int8` makes of its x."""


def has_tiles(device: torch.device) -> bool:
    """Whether AMX tiles multiply there, bf16 by bf16 into fp32."""
    return device.type == "cpu" and machine.has("amx")


def has_bytes(device: torch.device) -> bool:
    """Whether AVX-512 multiplies codes of 4 bits there, as bytes and under scales of groups."""
    return device.type == "cpu" and machine.has("avx512")


def multiply(left: Written, right: Written, dtype: torch.dtype) -> Tensor:
    """left [M, R] · right [P, R]ᵀ in `dtype`, summed in fp32 and rounded once."""
    if has_tiles(left.device) and has_bf16(left.encoded.format) and has_bf16(right.encoded.format):
        a, b = left.in_bf16(), right.in_bf16()
        if a is not None and b is not None:
            return _multiply_bf16(*a, *b, dtype)
    if has_bytes(left.device) and takes_both(left.encoded.format, right.encoded.format):
        x, w = left.in_codes(), right.in_codes()
        if x is not None and w is not None:
            return _multiply_codes(x, w, dtype)
    a, b = left.numbers(), right.numbers()
    if a.dtype == b.dtype == dtype and dtype in _HALVES:
        if a.is_cuda:
            return a @ b.T
        if b.is_contiguous():
            return linear_dense(a.contiguous(), b)
    return (a.to(torch.float32) @ b.to(torch.float32).T).to(dtype)


def _multiply_codes(left: Encoded, right: Encoded, dtype: torch.dtype) -> Tensor:
    stored = [each.tensors.get(name) for each in (left, right) for name in ("codes", "scale", "global_scale")]
    own = dtype if dtype in TYPES else torch.float32
    return linear_both(*stored, str(left.format), str(right.format), left.shape[1], own).to(dtype)  # type: ignore[arg-type]


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
    left = left.contiguous() if left.dtype == dtype and dtype in TYPES else left.to(torch.float32)
    stored = (right.tensors.get(name) for name in ("codes", "scale", "zero", "global_scale"))
    return linear_coded_int8(left, *stored, None, str(right.encoded.format), left.shape[1]).to(dtype)  # type: ignore[arg-type]


class Kept(NamedTuple):
    """The operands that backward needs again: x as `grad_weight` wants it (its numbers [T, K] where these turn or are
    reused, else written along the tokens) and weight as `output` did.
    """

    x: Written | None
    weight: Written | None


def forward(
    step: Step, x: Tensor, weight: Tensor, dtype: torch.dtype, *, keeps_x: bool, keeps_weight: bool
) -> tuple[Tensor, Kept]:
    """output = x [T, K] · weight [N, K]ᵀ in `dtype`, and of both operands what is to be kept for backward."""
    recipe = step.recipe
    right = step.write("output", 1, weight)
    left = None
    if takes_bytes(recipe.output) and not recipe.grad_weight.right.reused:
        y = step.multiply_bytes("output", x, right, dtype)
    else:
        left = step.write("output", 0, x)
        y = multiply(left, right, dtype)
    kept_x = None
    if keeps_x:
        kept_x = left if recipe.grad_weight.right.reused else step.write("grad_weight", 1, x, transposed=True)
    return y, Kept(kept_x, right if keeps_weight else None)


def backward(
    step: Step, grad: Tensor, weight: Tensor, kept: Kept, dtypes: Sequence[torch.dtype], needs: Sequence[bool]
) -> list[Tensor]:
    """Those of grad_x [T, K], grad_weight [N, K] and grad_bias [N] of which one `needs`, in their `dtypes`, from `grad`
    [T, N].
    """
    recipe, found = step.recipe, []
    if needs[0]:
        if recipe.grad_input.right.reused:
            assert kept.weight is not None
            right = dataclasses.replace(kept.weight, turned=True)
        else:
            right = step.write("grad_input", 1, weight, transposed=True)
        found.append(step.product("grad_input", grad, right, dtypes[0]))
    if needs[1]:
        found.append(_grad_weight(step, grad, weight, kept, dtypes[1]))
    if not recipe.is_dense:
        _show_overflow(grad, *found)
    if needs[2]:
        found.append(grad.sum(0, dtype=torch.float32).to(dtypes[2]))
    return found


def _grad_weight(step: Step, grad: Tensor, weight: Tensor, kept: Kept, dtype: torch.dtype) -> Tensor:
    if not grad.shape[0]:
        return torch.zeros_like(weight, dtype=dtype)
    operand = step.recipe.output.right
    assert kept.x is not None
    right = dataclasses.replace(kept.x, turned=True) if step.recipe.turns_x else kept.x
    if not operand.dge:
        return step.product("grad_weight", grad, right, dtype, transposed=True)
    assert kept.weight is not None
    found = step.product("grad_weight", grad, right, torch.float32, transposed=True)
    return found.mul_(estimator(operand, weight, kept.weight)).to(dtype)


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


class Step:
    """One step of a layer, from forward to backward: writes its operands, with seeds of their own, and has them
    measured where the step is watched (`sums`).

    `seeds` are those of `recipe.seeds`, or of these as many as are for `output`. `scales` are the fp32 [1, 1] scales
    of the operands whose format is delayed.
    """

    def __init__(
        self, recipe: Recipe, seeds: Sequence[int], scales: Mapping[Role, Tensor], sums: Sums | None = None
    ) -> None:
        self.recipe, self.scales, self.sums = recipe, scales, sums
        self.seeds = dict(zip(recipe.seeds, seeds, strict=False))
        self._written: dict[tuple[Role, Operand], Written] = {}

    def write(self, product: ProductName, side: int, x: Tensor, *, transposed: bool = False) -> Written:
        """`x`, or its transpose, as the left (`side` 0) or right operand of `product`. What turns is written once."""
        operand, role = (*self.recipe.pair(product),)[side], FACTORS[product][side]
        scale = self.scales[role] if operand.is_delayed else None
        seed, sign_seed = self.seeds.get((product, side), 0), self.seeds.get((product, SIGNS), 0)
        turned = transposed and operand.turns
        how: dict[str, Any] = {"transposed": transposed and not turned, "sign_seed": sign_seed}
        written = self._written.get((role, operand))
        if written is None:
            make = functools.partial(write, operand, x, seed=seed, scale=scale, **how)
            written = STORE.once(operand, x, how["transposed"], make) if role == "weight" else make()
        if operand.turns:
            self._written[role, operand] = written
        if self.sums is not None:
            self.sums.add(product, role, x, written, operand, **how)
        return dataclasses.replace(written, turned=True) if turned else written

    def product(
        self, product: ProductName, left: Tensor, right: Written, dtype: torch.dtype, *, transposed: bool = False
    ) -> Tensor:
        """The product of `left` (its transpose where `transposed`) with a right operand that is written already."""
        if takes_bytes(self.recipe.pair(product)):
            return self.multiply_bytes(product, left, right, dtype, transposed=transposed)
        return multiply(self.write(product, 0, left, transposed=transposed), right, dtype)

    def multiply_bytes(
        self, product: ProductName, left: Tensor, right: Written, dtype: torch.dtype, *, transposed: bool = False
    ) -> Tensor:
        """`multiply_bytes`, measured where the step is watched."""
        if self.sums is not None:
            self.sums.add_bytes(product, FACTORS[product][0], left, _BYTES, transposed=transposed)
        return multiply_bytes(left.T if transposed else left, right, dtype)


def scale_of(x: Tensor, element: Float, state: DelayedScaling) -> Tensor:
    """fp32 [2]: amax of `x`, 0 where it is not finite (an overflow tells nothing of the steps that follow), and the
    delayed scale under which x is written: on the first step, whose history is empty, that of its own amax.
    """
    amax = x.abs().amax().to(torch.float32) if x.numel() else x.new_zeros((), dtype=torch.float32)
    amax = torch.where(amax.isfinite(), amax, 0.0)
    own = torch.where(amax > 0, amax / element.max, 1.0)
    return torch.stack([amax, torch.where(state.history.any(), state.scale.reshape(()), own)])
