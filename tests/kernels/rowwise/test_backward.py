"""Derivatives of norms and gates: every kernel against fp64, in every dtype, and mixed ones as under autocast."""

from typing import Any

import pytest
import torch
from tests.kernels.rowwise.test_rowwise import FLOATS, inputs, usable
from tests.laws.kernel_laws import KernelLaws
from torch import Tensor
from torch.nn import functional

from parco.kernels.rowwise import ACTIVATIONS, gated, layer_norm, rms_norm, rotate
from parco.kernels.rowwise.norm_backward import norm_backward

F32, BF16, F16 = FLOATS


def norm_grads(x: Tensor, weight: Tensor, grad: Tensor, centered: bool) -> tuple[Tensor, ...]:
    """Of layer_norm without, or of rms_norm with an offset of 1, in fp64 by PyTorch."""
    x, weight = (tensor.double().requires_grad_() for tensor in (x, weight))
    bias = torch.zeros_like(weight).requires_grad_()
    columns = weight.shape
    if centered:
        y = functional.layer_norm(x, columns, weight, bias, 1e-5)
    else:
        y = functional.rms_norm(x, columns, None, 1e-5) * (weight + 1) + bias
    return torch.autograd.grad(y, (x, weight, bias), grad.double())


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(
    ("dtype", "of_weight", "of_grad"),
    [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16), (F32, F32, BF16), (BF16, F32, BF16)],
    ids=str,
)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 37), (64, 8), (131, 300)])
def test_norm_backward_of_every_kernel(
    rows: int, columns: int, dtype: torch.dtype, of_weight: torch.dtype, of_grad: torch.dtype, centered: bool
) -> None:
    x, grad = inputs(rows, columns, dtype=dtype) * 3 + 1, inputs(rows, columns, dtype=of_grad, seed=3)
    weight = inputs(columns, dtype=of_weight, seed=4)
    wanted = norm_grads(x, weight, grad, centered)
    for name, run in usable("norm_backward"):
        found = run(grad, x, weight, 1e-5, 0.0 if centered else 1.0, centered, True)
        assert [each.dtype for each in found[:2]] == [dtype, of_weight], name
        assert found[2].numel() == (columns if centered else 0), name
        for mine, exact in zip(found, wanted, strict=True):
            if mine.numel():
                # Sums of up to 131 rows, and of a row, in fp32, whose terms are some units.
                bound = torch.finfo(mine.dtype).eps * exact.abs() + 1e-5 * (1 + exact.abs().max())
                assert ((mine.double() - exact).abs() <= bound).all(), name
        alone = run(grad, x, weight, 1e-5, 0.0 if centered else 1.0, centered, False)
        assert torch.equal(alone[0], found[0]), name
        assert alone[1].numel() == alone[2].numel() == 0, name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_backward_of_every_kernel(activation: str, dtype: torch.dtype) -> None:
    gate, up, grad = (inputs(3, 333, dtype=dtype, seed=seed) * 4 for seed in (1, 2, 3))
    leaves = [each.double().requires_grad_() for each in (gate, up)]
    wanted = torch.autograd.grad(ACTIVATIONS[activation](leaves[0]) * leaves[1], leaves, grad.double())
    for name, run in usable("gated_backward"):
        if name == "gated-backward-torch" and "gelu" in activation:  # PyTorch's loses figures where 1 + erf cancels
            continue
        for mine, exact in zip(run(grad, gate, up, activation), wanted, strict=True):
            assert mine.dtype == dtype
            bound = torch.finfo(dtype).eps / 2 * 1.01 * exact.abs() + 1e-5 * (1 + exact.abs())
            assert ((mine.double() - exact).abs() <= bound).all(), name


def test_gated_backward_at_the_ends() -> None:
    gate = torch.tensor([0.0, 1e-30, 90.0, -90.0, 1e4, -1e4, float("nan")])
    one = torch.ones_like(gate)
    for activation in ACTIVATIONS:
        wanted = table_reference(one, gate, activation)
        for name, run in usable("gated_backward"):
            for mine, exact in zip(run(one, gate, one, activation), wanted, strict=True):
                torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-6, equal_nan=True, msg=name)


def table_reference(grad: Tensor, gate: Tensor, activation: str) -> Any:
    return dict(usable("gated_backward"))["gated-backward-torch"](grad, gate, torch.ones_like(gate), activation)


def test_results_do_not_depend_on_the_threads() -> None:
    x, grad, weight = inputs(700, 300), inputs(700, 300, seed=5), inputs(300)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                (
                    *norm_backward(grad, x, weight, 1e-5, 0.0, True, True),
                    *torch.ops.parco.gated_backward(grad, x, grad, "silu"),
                )
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_norms_and_rotations_of_two_dtypes() -> None:
    """As under autocast: a residual stream and weights of fp32 give bf16, and heads of bf16 turn by angles of fp32."""
    x, weight = inputs(9, 40), inputs(40, seed=3)
    q, cos, sin = inputs(1, 2, 9, 8, dtype=BF16), inputs(1, 9, 8, seed=4), inputs(1, 9, 8, seed=5)
    for name, run in usable("rms_norm"):
        exact = run(x, weight, 1e-5, 0.0, False)
        assert torch.equal(run(x, weight, 1e-5, 0.0, False, BF16), exact.bfloat16()), name
        narrow = run(x.bfloat16(), weight, 1e-5, 0.0, False)
        assert torch.equal(narrow, run(x.bfloat16().float(), weight, 1e-5, 0.0, False).bfloat16()), name
    for name, run in usable("layer_norm"):
        exact = run(x, weight, weight, 1e-5)
        assert torch.equal(run(x, weight, weight, 1e-5, BF16), exact.bfloat16()), name
    for name, run in usable("rotate"):
        wide = run(q.float(), q.float(), cos, sin)
        assert all(torch.equal(a, b.bfloat16()) for a, b in zip(run(q, q, cos, sin), wide, strict=True)), name
    leaves = x.requires_grad_(), weight.requires_grad_()
    for y in (rms_norm(*leaves, dtype=BF16), layer_norm(*leaves, dtype=BF16)):
        assert y.dtype == BF16
        assert [each.dtype for each in torch.autograd.grad(y.sum(), leaves)] == [F32, F32]


def test_what_forward_keeps_is_what_it_was_given() -> None:
    """No copies in another dtype: each tensor that is saved is one of the arguments."""
    x, weight = inputs(9, 40, dtype=BF16).requires_grad_(), inputs(40).requires_grad_()
    heads, angles = inputs(1, 2, 9, 8, dtype=BF16).requires_grad_(), inputs(1, 9, 8)
    given = {each.data_ptr() for each in (x, weight, angles)}
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):
        rms_norm(x, weight), layer_norm(x, weight), gated(x, x, "silu"), rotate(heads, heads, angles, angles)
    assert len(kept) == 8
    assert set(kept) <= given


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rms_norm(inputs(2, 8, dtype=BF16), inputs(8), dtype=F16), TypeError, "dtype is torch.float16"),
        (lambda: layer_norm(inputs(2, 8), inputs(8), dtype=torch.float64), TypeError, "dtype is torch.float64"),
        (lambda: layer_norm(inputs(2, 8, dtype=BF16), inputs(8), inputs(8, dtype=BF16)), TypeError, "bias is"),
        (lambda: norm_backward(inputs(2, 7), inputs(2, 8), inputs(8), 1e-5, 0.0, False, True), ValueError, "grad has"),
        (lambda: torch.ops.parco.gated_backward(inputs(3), inputs(4), inputs(4), "silu"), ValueError, "grad is"),
    ],
)
def test_wrong_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


class TestNormBackward(KernelLaws):
    operation = "norm_backward"

    @pytest.fixture(params=[(F32, F32, True), (BF16, F32, False)], ids=str)
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        dtype, of_weight, centered = request.param
        x, grad = inputs(3, 40, 50, dtype=dtype), inputs(3, 40, 50, dtype=dtype, seed=3)
        return grad, x, inputs(50, dtype=of_weight), 1e-5, 0.0, centered, True

    def assert_agrees(self, found: Tensor, expected: Tensor, call: tuple[Any, ...], name: str) -> None:
        torch.testing.assert_close(found, expected, rtol=1e-2 if call[1].dtype == BF16 else 1e-5, atol=2e-5)


class TestGatedBackward(KernelLaws):
    operation = "gated_backward"

    @pytest.fixture(params=[("silu", F32), ("gelu_tanh", BF16), ("gelu", F16)], ids=str)
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        activation, dtype = request.param
        return *(inputs(3, 50, dtype=dtype, seed=seed) for seed in (1, 2, 3)), activation
