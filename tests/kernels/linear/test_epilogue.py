"""What becomes of a product before its one rounding: activations and addends, in every operation and kernel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.kernels.linear.test_coded import compiled, inputs, packed, stored
from torch import Tensor

from parco import machine
from parco.kernels import table
from parco.kernels.activations import ACTIVATIONS
from parco.kernels.linear import linear_coded, linear_coded_int8, linear_dense, reference
from parco.kernels.linear.storage import storage

FLOATS = [torch.float32, torch.bfloat16]
NAMES = ["none", *ACTIVATIONS]
FORMATS = ["int4:32", "int8:row", "nf4:32", "int8:column", "mxfp4"]


def product(format: str) -> Callable[..., Tensor]:
    """x, bias, activation, addend -> y by 37 x 96 numbers of `format`, or dense ones."""
    if format == "bf16":
        weight = inputs(37, 96, dtype=torch.bfloat16, seed=6) / 10
        return lambda x, bias, *after: linear_dense(x, weight, bias, *after)
    operation = linear_coded_int8 if format == "int8 activations" else linear_coded
    format = "int4:32" if format == "int8 activations" else format
    tensors = stored(format, 37, 96)
    return lambda x, bias, *after: operation(x, *tensors, bias, format, 96, 37, *after)


def assert_finished(
    y: Tensor, before: Tensor, activation: str, addend: Tensor | None, spread: Tensor | float = 0.0
) -> None:
    """`before` is the product in fp32, within `spread`. Polynomials are within a few units of fp32's last place of what
    they are of, no slope but the square's is above 1.13, and there is one rounding, of half a unit.
    """
    wide = before.double()
    expected = wide if activation == "none" else ACTIVATIONS[activation](wide)
    expected = expected if addend is None else expected + addend.double()
    steep = 2 * wide.abs() + 1 if activation == "relu_squared" else 1.2
    bound = torch.finfo(y.dtype).eps / 2 * expected.abs() + steep * spread + 2.0**-20 * (1 + wide.square())
    assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("rows", [1, 5, 60])
@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("format", FORMATS)
def test_every_kernel_finishes_its_products(format: str, activation: str, rows: int) -> None:
    tensors, bias = stored(format, 37, 96), inputs(37, seed=3)
    magnitude = reference.dense(*tensors, format, 96).abs().sum(1)
    layouts = [(tensors, 0)]
    if storage(format).packs((37, 96)):
        layouts.append((packed(tensors, format, (37, 96)), 37))
    for dtype in FLOATS:
        x = inputs(rows, 96, dtype=dtype)
        for addend in (None, inputs(rows, 37, dtype=dtype, seed=5), inputs(rows, 37, seed=5)):
            same = None
            for name, integers, run in compiled(format):
                for own, outputs in layouts:
                    before = run(x.float(), *own, bias, format, 96, outputs)
                    y = run(x, *own, bias, format, 96, outputs, activation, addend)
                    assert y.dtype == dtype
                    # A word of 16 bits keeps 2^-15 of its block's largest magnitude.
                    spread = 2.0**-14 * x.float().abs().max() * magnitude
                    assert_finished(y, before, activation, addend, spread)
                    exact = integers and activation in ("none", "relu", "relu_squared") and "column" not in format
                    if exact:
                        assert same is None or torch.equal(y, same), name
                        same = y


@pytest.mark.parametrize("rows", [1, 4, 7, 60])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", NAMES)
def test_every_dense_kernel_finishes_its_products(activation: str, weight_dtype: torch.dtype, rows: int) -> None:
    weight, bias = inputs(37, 96, dtype=weight_dtype, seed=6) / 10, inputs(37, seed=3)
    for dtype in FLOATS:
        x, addend = inputs(rows, 96, dtype=dtype), inputs(rows, 37, dtype=dtype, seed=5)
        for kernel in table.operations()["linear_dense"].kernels:
            if kernel.isa not in machine.detect().isas:
                continue
            before = kernel.run(x.float(), weight, bias)
            for after in ((activation, None), (activation, addend), (activation, addend.float())):
                assert_finished(kernel.run(x, weight, bias, *after), before, *after)
        y = linear_dense(x, weight, bias, activation, addend)
        expected = reference.linear_dense(x, weight, bias, activation, addend)
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("format", ["bf16", "int4:32", "int8 activations", "nf4:32"])
def test_threads_do_not_change_the_bits(format: str) -> None:
    run, threads = product(format), torch.get_num_threads()
    x, addend = inputs(60, 96, dtype=torch.bfloat16), inputs(60, 37, dtype=torch.bfloat16, seed=5)
    try:
        torch.set_num_threads(1)
        alone = run(x, None, "gelu", addend)
        torch.set_num_threads(3)
        assert torch.equal(run(x, None, "gelu", addend), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("format", ["bf16", "int4:32", "int8 activations"])
def test_gradients_are_those_of_the_steps_apart(format: str, activation: str) -> None:
    run = product(format)
    found: list[list[Tensor]] = []
    for whole in (True, False):
        x, bias = inputs(5, 96).requires_grad_(), inputs(37, seed=3).requires_grad_()
        addend = inputs(5, 37, seed=5).requires_grad_()
        if whole:
            y = run(x, bias, activation, addend)
        else:
            y = run(x, bias)
            y = (y if activation == "none" else ACTIVATIONS[activation](y)) + addend
        found.append([y, *torch.autograd.grad(y, (x, bias, addend), inputs(5, 37, seed=4))])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_the_weight_of_a_dense_product_gets_its_gradient() -> None:
    x, weight = inputs(5, 96), inputs(37, 96, seed=6).requires_grad_()
    grad = inputs(5, 37, seed=4)
    (found,) = torch.autograd.grad(linear_dense(x, weight, None, "silu"), weight, grad)
    (expected,) = torch.autograd.grad(ACTIVATIONS["silu"](x @ weight.T), weight, grad)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["bf16", "int4:32"])
def test_compiles_and_exports(format: str) -> None:
    run = product(format)
    x, addend = inputs(5, 96).requires_grad_(), inputs(5, 37, seed=5)
    whole = torch.compile(lambda x: run(x, None, "gelu", addend), fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(x), run(x, None, "gelu", addend))

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, addend: Tensor) -> Tensor:
            return run(x, None, "gelu", addend)

    with torch.no_grad():
        exported = torch.export.export(Module(), (x.detach(), addend))
        assert torch.equal(exported.module()(x, addend), run(x, None, "gelu", addend))


@pytest.mark.parametrize("name", ["linear_coded", "linear_coded_int8", "linear_dense"])
def test_the_operation_itself_passes_opcheck(name: str) -> None:
    x, addend = inputs(3, 96).requires_grad_(), inputs(3, 37, seed=5).requires_grad_()
    tensors: tuple[Any, ...] = (*stored("int4:32", 37, 96), None, "int4:32", 96, 37)
    if name == "linear_dense":
        tensors = (inputs(37, 96, seed=6).requires_grad_(), None)
    torch.library.opcheck(getattr(torch.ops.parco, name).default, (x, *tensors, "silu", addend))


@pytest.mark.parametrize(
    ("after", "error", "message"),
    [
        (("tanh",), ValueError, "activation='tanh'"),
        (("none", torch.zeros(3, 36)), ValueError, "addend has the shape"),
        (("none", torch.zeros(37)), ValueError, "addend has the shape"),
        (("none", torch.zeros(3, 37, dtype=torch.float16)), TypeError, "addend is torch.float16"),
    ],
)
@pytest.mark.parametrize("format", ["bf16", "int4:32", "int8 activations"])
def test_wrong_arguments_are_named(format: str, after: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        product(format)(torch.zeros(3, 96), None, *after)
