"""linear_lora: a frozen matrix with LoRA's factors beside it in one operation, against the numbers they stand for."""

import itertools
from typing import Any

import pytest
import torch
from tests.kernels.linear.test_chain import made
from tests.kernels.linear.test_coded import inputs
from tests.laws.kernel_laws import KernelLaws
from torch import Tensor

from parco.kernels.linear import linear_lora
from parco.kernels.linear.dropped import ROWS, dropped

PLANS = ["bf16 37x96", "fp32 37x96", "int4:32 37x96", "nf4:32 37x16 * bf16 16x96", "int8:row 37x96 + bf16 37x96"]
SCALE = 0.7
P = 0.25


def arguments(plan: str, rows: int, dtype: torch.dtype, p: float = 0.0) -> tuple[Any, ...]:
    _, tensors = made(plan, packed=True)
    factors = [inputs(5, 96, seed=4) / 10, inputs(37, 5, seed=5)]
    x, bias = inputs(rows, 96, dtype=dtype), inputs(37, seed=3)
    seed = torch.tensor([11]) if p else None
    return (x.requires_grad_(), list(tensors), bias, plan, *(f.requires_grad_() for f in factors), SCALE, seed, p)


def exact(plan: str, call: tuple[Any, ...]) -> list[Tensor]:
    """y and the gradients of x, a and b in float64, those of y · ramp."""
    x, _, bias, _, a, b, scale, seed, p = call
    x, a, b = (each.detach().double().requires_grad_() for each in (x, a, b))
    matrix = made(plan)[0].dense(*made(plan)[1], dtype=torch.float64)
    mask = dropped(torch.ones(x.shape, dtype=torch.float64), p, int(seed)) if p else 1.0
    y = x @ matrix.T + (0 if bias is None else bias.double()) + scale * (x * mask) @ a.T @ b.T
    return [y.detach(), *torch.autograd.grad(y, (x, a, b), ramp(y))]


def ramp(y: Tensor) -> Tensor:
    return torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("rows", [1, 60, 1100])
@pytest.mark.parametrize("plan", PLANS)
def test_values_and_gradients_are_those_of_the_matrices(plan: str, rows: int, p: float) -> None:
    call = arguments(plan, rows, torch.float32, p)
    y = linear_lora(*call)
    found = [y.detach(), *torch.autograd.grad(y, (call[0], call[4], call[5]), ramp(y))]
    # Factors between which fp32 is not rounded; a row written in integers loses 2⁻²⁹ of its greatest.
    for mine, expected in zip(found, exact(plan, call), strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-4, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("rows", [60, 1100])
@pytest.mark.parametrize("plan", PLANS[:1] + PLANS[2:3])
def test_16_bits_are_rounded_once(plan: str, rows: int) -> None:
    """y and the gradient of x are within half a unit of bf16 of the truth, and little beside."""
    call = arguments(plan, rows, torch.bfloat16)
    y = linear_lora(*call)
    found = [y.detach(), *torch.autograd.grad(y, call[0], ramp(y))]
    expected = exact(plan, call)
    expected[1] = exact_grad_x(plan, call, ramp(y))
    for mine, wanted in zip(found, expected, strict=False):
        slack = 2e-5 * wanted.abs().max()
        assert ((mine.double() - wanted).abs() <= 2.0**-8 * wanted.abs() + slack).all()


def exact_grad_x(plan: str, call: tuple[Any, ...], grad: Tensor) -> Tensor:
    matrix = made(plan)[0].dense(*made(plan)[1], dtype=torch.float64)
    return grad.double() @ (matrix + call[6] * call[5].detach().double() @ call[4].detach().double())


def test_x_is_kept_once_and_no_mask() -> None:
    call = arguments("fp32 37x96", 300, torch.float32, P)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_lora(*call)
    assert {t.data_ptr() for t in kept if t.numel() >= 37 * 96} == {call[0].data_ptr(), call[1][0].data_ptr()}


def test_dropout_is_the_same_for_any_number_of_threads_and_of_the_factors_alone() -> None:
    call = arguments("bf16 37x96", 1100, torch.bfloat16, P)
    mask = dropped(torch.ones(1100, 96), P, 11)
    assert mask.unique().tolist() == [0.0, pytest.approx(1 / (1 - P))]
    assert abs(float((mask == 0).double().mean()) - P) < 0.006  # 105,600 draws: four standard deviations
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(mask, dropped(torch.ones(1100, 96), P, 11))
    finally:
        torch.set_num_threads(threads)
    silent = (*call[:5], torch.zeros_like(call[5]), *call[6:])
    without = (*silent[:6], SCALE, None, 0.0)
    assert torch.equal(linear_lora(*silent), linear_lora(*without))


def test_blocks_of_rows_have_masks_of_their_own() -> None:
    """Where half of two masks is 0, half of their numbers differ, unless one is the other."""
    ones = torch.ones(3 * ROWS, 96)
    blocks = [block for seed in (11, 12, 13) for block in dropped(ones, 0.5, seed).split(ROWS)]
    for one, other in itertools.combinations(blocks, 2):
        assert abs(float((one != other).double().mean()) - 0.5) < 0.015  # 49,152 draws: six standard deviations


@pytest.mark.parametrize("trains", [False, True])
def test_what_is_kept_in_16_bits_is_divided_by_1_minus_p_in_fp32(trains: bool) -> None:
    """1 / 0.7 in bf16 is greater by 8e-4, which would be in every number; what is rounded once is off on average by
    0.
    """
    plan, p = "bf16 37x96", 0.3
    x, (matrix,), _, _, a, b, scale, *_ = arguments(plan, 60, torch.bfloat16)
    x, a, b = x.detach(), a.detach(), b.detach()
    matrix = torch.zeros_like(matrix).requires_grad_(trains)
    call = (x, [matrix], None, plan, a, b, scale, torch.tensor([11]), p)
    mask = dropped(torch.ones(x.shape, dtype=torch.float64), p, 11)
    assert mask.max() == pytest.approx(1 / (1 - p), rel=1e-12)
    expected = scale * (x.double() * mask) @ a.double().T @ b.double().T
    for found, exact in ((linear_lora(*call).detach(), expected), (dropped(x, p, 11), x * mask)):
        assert float((found.double() * exact).sum() / exact.square().sum()) == pytest.approx(1, abs=2e-4)


@pytest.mark.parametrize("plan", ["bf16 37x96", "fp32 37x96"])
def test_a_matrix_that_trains_has_its_gradient(plan: str) -> None:
    call = arguments(plan, 20, torch.float32, P)
    call[1][0].requires_grad_()
    (grad,) = torch.autograd.grad(linear_lora(*call).sum(), call[1][0])
    expected = call[0].detach().double().sum(0).expand(37, 96)
    torch.testing.assert_close(grad.double(), expected, rtol=2.0**-8, atol=1e-3)


def test_a_bias_has_its_gradient_and_frozen_factors_none() -> None:
    call = arguments("bf16 37x96", 20, torch.bfloat16)
    bias = call[2].to(torch.bfloat16).requires_grad_()
    y = linear_lora(call[0].detach(), call[1], bias, *call[3:4], call[4].detach(), call[5].detach(), *call[6:])
    (grad,) = torch.autograd.grad(y.sum(), bias)
    assert torch.equal(grad, torch.full_like(bias, 20.0))


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, torch.zeros(3, 95), "last dimension must be 96"),
        (4, torch.zeros(5, 95), r"a has the shape \(5, 95\)"),
        (4, torch.zeros(()), r"a has the shape \(\)"),
        (4, torch.zeros(96), r"a has the shape \(96,\)"),
        (5, torch.zeros(()), r"b has the shape \(\)"),
        (5, torch.zeros(37, 4), r"b has the shape \(37, 4\)"),
        (7, None, "seed must be one int64"),
        (8, 1.0, "p is 1"),
    ],
)
def test_what_does_not_fit_is_named(place: int, wrong: Any, message: str) -> None:
    call = list(arguments("bf16 37x96", 3, torch.float32, P))
    call[place] = wrong
    with pytest.raises(ValueError, match=message):
        linear_lora(*call)


CALLS = [(plan, 5, torch.bfloat16, 0.0) for plan in PLANS] + [(PLANS[0], 600, torch.bfloat16, P)]
CALLS += [(PLANS[1], 600, torch.float32, P), (PLANS[2], 1, torch.float32, 0.0)]


class TestLinearLora(KernelLaws):
    operation = "linear_lora"

    @pytest.fixture(params=CALLS, ids=str)
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        return arguments(*request.param)

    def assert_agrees(self, found: Tensor, expected: Tensor, call: tuple[Any, ...], name: str) -> None:
        # Rounded between factors and terms, or once.
        tolerance = 2 * torch.finfo(found.dtype).eps
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=(tolerance + 2e-6) * scale, msg=name)


class TestLinearLoraBackward(KernelLaws):
    operation = "linear_lora_backward"

    @pytest.fixture(params=[(*each, needs) for each in CALLS[-4:] for needs in ([True] * 3, [True, False, True])])
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        *given, needs = request.param
        x, tensors, _, plan, a, b, *dropout = (
            each.detach() if isinstance(each, Tensor) else each for each in arguments(*given)
        )
        grad = inputs(*x.shape[:-1], 37, dtype=x.dtype, seed=6)
        return (grad, x, tensors, plan, a, b, *dropout, needs)

    def assert_agrees(self, found: Tensor, expected: Tensor, call: tuple[Any, ...], name: str) -> None:
        tolerance = 2 * torch.finfo(found.dtype).eps + 1e-5
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
