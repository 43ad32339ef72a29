"""linear_dense: every pair of dtypes, rows alone or together, gradients."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.kernels.linear.test_coded import FLOATS, inputs
from tests.laws.kernel_laws import KernelLaws
from torch import Tensor

from parco import machine
from parco.kernels import table
from parco.kernels.linear import linear_dense


def assert_within(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> None:
    """fp32 sums of K exact-to-2^-24 products, each rounded once more as it is added, then one rounding to x's dtype."""
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    magnitude = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    bound = (x.shape[-1] + 2) * 2.0**-24 * magnitude
    assert ((y.double() - expected).abs() <= bound + torch.finfo(x.dtype).eps / 2 * (expected.abs() + bound)).all(), (
        name
    )


def runnable(dtype: torch.dtype, weight_dtype: torch.dtype) -> Iterator[table.Kernel]:
    """Every compiled kernel that this machine runs and that takes such operands, however few rows."""
    for kernel in table.operations()["linear_dense"].kernels:
        if kernel.isa == "amx" and not dtype == weight_dtype == torch.bfloat16:
            continue
        if kernel.isa in machine.detect().isas:
            yield kernel


@pytest.mark.parametrize("weight_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(37, 100), (8, 64), (19, 33), (1, 1), (130, 257)], ids=str)
def test_every_kernel_is_within_its_bound_and_treats_rows_alone(
    shape: tuple[int, int], dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    x, weight = inputs(8, shape[1], dtype=dtype), inputs(*shape, dtype=weight_dtype, seed=6)
    bias = inputs(shape[0], seed=7)
    for kernel in runnable(dtype, weight_dtype):
        whole = kernel.run(x, weight, bias)
        assert_within(whole, x, weight, bias, kernel.name)
        for rows in range(1, 8):
            assert torch.equal(kernel.run(x[:rows], weight, bias), whole[:rows]), (kernel.name, rows)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_tiles_a_row_depends_on_no_other(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, weight = inputs(525, 300, dtype=dtype), inputs(61, 300, dtype=weight_dtype, seed=6)
    bias = inputs(61, seed=7)
    for kernel in runnable(dtype, weight_dtype):
        whole = kernel.run(x, weight, bias)
        assert_within(whole, x, weight, bias, kernel.name)
        for rows in (9, 12, 13, 31, 520):
            assert torch.equal(kernel.run(x[:rows], weight, bias), whole[:rows]), (kernel.name, rows)


@pytest.mark.parametrize("rows", [0, 1, 8, 9, 140])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_number_of_rows(rows: int, dtype: torch.dtype) -> None:
    x, weight = inputs(rows, 96, dtype=dtype), inputs(40, 96, dtype=torch.bfloat16, seed=6)
    y = linear_dense(x, weight)
    assert (y.shape, y.dtype) == ((rows, 40), dtype)
    if rows:
        # Torch's own bf16 product may keep partial sums in bf16 between blocks: twice eps instead of half.
        expected = x.double() @ weight.double().T
        magnitude = x.double().abs() @ weight.double().abs().T
        assert ((y.double() - expected).abs() <= 2 * torch.finfo(dtype).eps * magnitude).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weight_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 60, 140])
def test_a_result_has_the_dtype_that_is_asked_for(rows: int, weight_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """The fp32 sum, rounded once to it: what every kernel gives in fp32 rounds to what it gives in 16 bits."""
    x, weight = inputs(rows, 96, dtype=torch.bfloat16), inputs(40, 96, dtype=weight_dtype, seed=6)
    bias, addend = inputs(40, seed=7), inputs(rows, 40, seed=8)
    for kernel in runnable(torch.bfloat16, weight_dtype):
        wide = kernel.run(x, weight, bias, "silu", addend, torch.float32)
        assert_within(kernel.run(x, weight, bias, dtype=torch.float32), x.float(), weight, bias, kernel.name)
        assert torch.equal(kernel.run(x, weight, bias, "silu", addend, dtype), wide.to(dtype)), kernel.name
    x.requires_grad_(), weight.requires_grad_()
    y = linear_dense(x, weight, dtype=dtype)
    assert y.dtype == dtype
    y.backward(torch.ones_like(y))
    assert (x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, weight_dtype)
    torch.testing.assert_close(x.grad, weight.detach().float().sum(0).expand(rows, 96).to(torch.bfloat16))


@pytest.mark.parametrize("rows", [3, 60])
def test_threads_do_not_change_the_bits(rows: int) -> None:
    x, weight = inputs(rows, 512, dtype=torch.bfloat16), inputs(1000, 512, dtype=torch.bfloat16, seed=6)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = linear_dense(x, weight)
        torch.set_num_threads(3)
        assert torch.equal(linear_dense(x, weight), alone)
    finally:
        torch.set_num_threads(threads)


def test_gradients() -> None:
    x, weight, bias = (
        inputs(5, 64).requires_grad_(),
        inputs(11, 64, seed=6).requires_grad_(),
        inputs(11).requires_grad_(),
    )
    grad = inputs(5, 11, seed=4)
    linear_dense(x, weight, bias).backward(grad)
    torch.testing.assert_close(x.grad, grad @ weight)
    torch.testing.assert_close(weight.grad, grad.T @ x)
    torch.testing.assert_close(bias.grad, grad.sum(0))


def test_compiles_without_a_graph_break() -> None:
    x, weight = inputs(5, 64), inputs(11, 64, seed=6)
    layer = torch.compile(lambda x: torch.relu(linear_dense(x, weight)), fullgraph=True, backend="aot_eager")
    assert torch.equal(layer(x), torch.relu(linear_dense(x, weight)))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="x has the shape"):
        linear_dense(torch.zeros(2, 95), torch.zeros(3, 96))
    with pytest.raises(TypeError, match="weight is"):
        linear_dense(torch.zeros(2, 96), torch.zeros(3, 96, dtype=torch.int8))
    with pytest.raises(TypeError, match="dtype is"):
        linear_dense(torch.zeros(2, 96), torch.zeros(3, 96), dtype=torch.float64)
    with pytest.raises(ValueError, match="bias has the shape"):
        linear_dense(torch.zeros(2, 96), torch.zeros(3, 96), torch.zeros(2))


class TestLinearDense(KernelLaws):
    operation = "linear_dense"

    @pytest.fixture(params=[(1, torch.bfloat16), (4, torch.float32), (3, torch.float16), (60, torch.bfloat16)], ids=str)
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        rows, dtype = request.param
        x, weight = inputs(rows, 96, dtype=dtype), inputs(21, 96, dtype=dtype, seed=6)
        tensors = x.requires_grad_(), weight.requires_grad_(), inputs(21, dtype=dtype).requires_grad_()
        return tensors if rows != 60 else (*tensors, "silu", None, torch.float32)

    def assert_agrees(self, found: Tensor, expected: Tensor, call: tuple[Any, ...], name: str) -> None:
        x, weight, bias = (tensor.detach() for tensor in call[:3])
        if len(call) > 3:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        elif "native" not in name:  # torch's own product in half precision has its own bound
            assert_within(found.detach(), x, weight, bias, name)
