"""linear_chain: sums of products in one call, against its parts and the numbers they stand for."""

import copy
from typing import Any

import pytest
import torch
from tests.kernels.linear.test_coded import inputs
from tests.laws.kernel_laws import KernelLaws, forget_choices
from tests.laws.weight_laws import stored_tensors
from torch import Tensor

from parco import _C, machine, nn, weights
from parco.kernels import table
from parco.kernels.linear import chain, linear_chain
from parco.products import Activations
from parco.weights import Dense, LowRank, Quantized, Sum, Weight

PLANS = [
    "int8:row 37x24 * int8:row 24x96",
    "bf16 37x24 * bf16 24x96",
    "int4:32 37x96 + bf16 37x16 * bf16 16x96",
    "int4:32 37x96 by int8 + bf16 37x16 * int8:row 16x96 by int8",
    "nf4:32 37x96 + fp16 37x96 + fp32 37x8 * mxfp4 8x32 * int8:row 32x96",
    "int8:column 37x16 * bf16 16x96",
    "ternary5 37x96 + bf16 37x16 * ternary5:row 16x96",
]


def weight_of(plan: str) -> Weight:
    def leaf(factor: chain.Factor) -> Weight:
        shape = (factor.outputs, factor.columns)
        return Dense(shape, factor.format) if factor.dtype is not None else Quantized(factor.format, shape)

    terms: list[Weight] = []
    for term in chain.parse(plan):
        *rest, last = map(leaf, term)
        for each in reversed(rest):
            last = LowRank(each, last)
        terms.append(last)
    return Sum(*terms) if len(terms) > 1 else terms[0]


def made(plan: str, *, packed: bool = False) -> tuple[Weight, tuple[Tensor, ...]]:
    spec = weight_of(plan)
    tensors = stored_tensors(spec)
    return spec, spec.pack(*tensors) if packed else tensors


def assert_within(y: Tensor, x: Tensor, spec: Weight, tensors: tuple[Tensor, ...], bias: Tensor | None) -> None:
    """By the tolerance of the weight, a rounding of the bias's sum, and, where x is rounded to int8, half a code of
    every row: the greatest of x and of what stands between factors, which is at most the row's sum of magnitudes.
    """
    expected = x.double() @ spec.dense(*tensors, dtype=torch.float64).T + (0 if bias is None else bias.double())
    magnitude = x.double().abs() @ spec.magnitude(*tensors).double().T
    bound = spec.tolerance(x.dtype) * magnitude + torch.finfo(x.dtype).eps * expected.abs()
    assert ((y.double() - expected).abs() <= bound + 2.0**-22).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plan", [plan for plan in PLANS if "by int8" not in plan])
def test_every_instruction_set_multiplies_by_the_matrix(
    plan: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    bias = inputs(37, seed=3)
    try:
        for isa in machine.detect().isas:
            monkeypatch.setenv("PARCO_ISA", isa)
            forget_choices()
            for packed in (False, True):
                spec, tensors = made(plan, packed=packed)
                for rows in (1, 3, 9, 60):
                    x = inputs(rows, 96, dtype=dtype)
                    assert_within(linear_chain(x, tensors, bias, plan), x, spec, tensors, bias)
    finally:
        monkeypatch.undo()
        forget_choices()


def _runs_compiled(x: Tensor, tensors: tuple[Tensor, ...], plan: str) -> bool:
    return table.choose(chain.NAME, chain.describe(x, tensors, None, plan)).name == "chain-linear-compiled"


@pytest.mark.parametrize("rows", [1, 4, 9, 60, 700])
@pytest.mark.parametrize(
    "plan", ["int8:row 37x24 * int8:row 24x96", "bf16 37x24 * bf16 24x96", "int4:32 37x96 by int8", "nf4:32 37x96"]
)
def test_one_term_is_the_bits_of_its_products_apart(plan: str, rows: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        _, tensors = made(plan, packed=True)
        x, bias = inputs(rows, 96, dtype=dtype), inputs(37, seed=3)
        assert torch.equal(linear_chain(x, tensors, bias, plan), chain.apart(x, tensors, bias, plan))


def test_a_sum_is_rounded_once() -> None:
    """No further from the truth than half a unit of bf16, where the parts added up are."""
    plan = "int8:row 64x96 + bf16 64x16 * bf16 16x96"
    spec, tensors = made(plan, packed=True)
    x = inputs(4, 96, dtype=torch.bfloat16)
    assert _runs_compiled(x, tensors, plan)
    own = spec.products()
    assert own is not None
    narrow = own[1][1].apply(x, tensors[-1])
    exact = x.double() @ own[0][0].dense(*tensors[:2], dtype=torch.float64).T
    exact += narrow.double() @ tensors[-2].double().T
    y = linear_chain(x, tensors, None, plan).double()
    assert ((y - exact).abs() <= 2.0**-8 * exact.abs() * 1.01 + 2.0**-13).all()
    together = own[0][0].apply(x, *tensors[:2]) + own[1][0].apply(narrow, tensors[-2])
    assert (y - exact).norm() < (together.double() - exact).norm()


@pytest.mark.parametrize("rows", [1, 9, 300, 700])
@pytest.mark.parametrize("plan", PLANS)
def test_threads_and_rows_beside_do_not_change_the_bits(plan: str, rows: int) -> None:
    _, tensors = made(plan, packed=True)
    x = inputs(rows, 96, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = linear_chain(x, tensors, None, plan)
        torch.set_num_threads(3)
        assert torch.equal(linear_chain(x, tensors, None, plan), alone)
    finally:
        torch.set_num_threads(threads)
    if rows == 700 and plan == PLANS[0]:  # floats have another order up to 8 rows
        assert torch.equal(linear_chain(x[:5], tensors, None, plan), alone[:5])


def test_slabs_of_a_wide_rank_are_the_whole() -> None:
    """Rows are handled 128 and more at a time where what stands between factors would leave the cache."""
    plan = "int8:row 16x4096 * int8:row 4096x32"
    _, tensors = made(plan, packed=True)
    x = inputs(700, 32, dtype=torch.bfloat16)
    assert torch.equal(linear_chain(x, tensors, None, plan), chain.apart(x, tensors, None, plan))


@pytest.mark.parametrize("plan", [plan for plan in PLANS if "by int8" not in plan])
def test_gradients_of_x_and_bias(plan: str) -> None:
    spec, tensors = made(plan, packed=True)
    x, bias = inputs(5, 96).requires_grad_(), inputs(37).requires_grad_()
    grad = inputs(5, 37, seed=4)
    linear_chain(x, tensors, bias, plan).backward(grad)
    expected = grad.double() @ spec.dense(*tensors, dtype=torch.float64)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias.grad, grad.sum(0))


def test_factors_that_train_get_their_gradients() -> None:
    """LoRA's: a frozen quantized matrix and two dense factors."""
    spec = Sum(Quantized("int4:32", (37, 96)), LowRank(Dense((37, 4)), Dense((4, 96))))
    layer = nn.Linear(nn.StoredWeight(spec, stored_tensors(spec)))
    left, right = layer.weight.get_parameter("1.left.values"), layer.weight.get_parameter("1.right.values")
    for factor in (left, right):
        factor.requires_grad_()
    x, grad = inputs(5, 96), inputs(5, 37, seed=4)
    layer(x).backward(grad)
    torch.testing.assert_close(left.grad, grad.T @ (x @ right.T))
    torch.testing.assert_close(right.grad, left.T @ grad.T @ x)
    found = copy.deepcopy(layer)
    found.zero_grad()
    torch.compile(found, fullgraph=True, backend="aot_eager")(x).backward(grad)
    torch.testing.assert_close(found.weight.get_parameter("1.left.values").grad, left.grad)


def test_compiles_without_a_graph_break_and_exports() -> None:
    spec = weight_of(PLANS[2])
    layer = nn.Linear(nn.StoredWeight(spec, stored_tensors(spec)))
    x = inputs(5, 96).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    expected, x.grad = x.grad, None
    layer(x).sum().backward()
    assert torch.equal(x.grad, expected)
    with torch.no_grad():
        exported = torch.export.export(layer, (x.detach(),))
        calls = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
        assert calls == ["parco.linear_chain.default"]
        assert torch.equal(exported.module()(x), layer(x))


def test_a_weight_is_one_call_where_compiled_kernels_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    run = _C.run_chain

    def counted(*arguments: Any) -> None:
        ran.append(1)
        run(*arguments)

    monkeypatch.setattr(_C, "run_chain", counted)
    for plan in PLANS[:5]:
        spec, tensors = made(plan, packed=True)
        product = Activations() if "by int8" in plan else weights.weight.NATIVE
        assert spec.plan(product) == plan
        with torch.inference_mode():
            y = spec.apply(inputs(1, 96), *tensors, product=product)
        assert y.shape == (1, 37)
    assert len(ran) == 5
    inner = Sum(Dense((16, 96)), Dense((16, 96)))
    assert LowRank(Dense((37, 16)), inner).plan() is None


def test_every_compiled_kernel_is_known_by_its_name() -> None:
    for operation in ("linear_coded", "linear_coded_int8", "linear_dense"):
        for kernel in table.operations()[operation].kernels:
            if kernel.isa != table.TORCH:
                _C.Chain(0).dense(0, kernel.name, 1, 1, 0, 0)
    with pytest.raises(ValueError, match="no kernel is called nothing"):
        _C.Chain(0).dense(0, "nothing", 1, 1, 0, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 95)}, ValueError, "x has the shape"),
        ({"x": torch.zeros(2, 96, dtype=torch.float64)}, TypeError, "x is torch.float64"),
        ({"bias": torch.zeros(36)}, ValueError, "bias has the shape"),
        ({"tensors": [torch.zeros(37, 16)]}, ValueError, "1 tensors are given; the plan has 2"),
        ({"tensors": [torch.zeros(37, 16), torch.zeros(16, 95)]}, ValueError, "a matrix is"),
        ({"plan": "fp32 37x16 * fp32 15x96"}, ValueError, "16 rows are needed"),
        ({"plan": "fp32 37x96 + fp32 36x96"}, ValueError, "several shapes"),
        ({"plan": "fp32 37x96 by int8"}, ValueError, "does not multiply int8"),
        ({"plan": "fp32 37"}, ValueError, "factor 'fp32 37'"),
        ({"plan": "int4:32 37x96"}, TypeError, "codes is torch.float32"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 96),
        "tensors": [torch.zeros(37, 16), torch.zeros(16, 96)],
        "bias": None,
        "plan": "fp32 37x16 * fp32 16x96",
    }
    with pytest.raises(error, match=message):
        linear_chain(**(arguments | change))


class TestLinearChain(KernelLaws):
    operation = "linear_chain"

    @pytest.fixture(
        params=[(1, plan, torch.bfloat16) for plan in PLANS]
        + [(60, PLANS[2], torch.float32), (5, PLANS[1], torch.bfloat16)],
        ids=str,
    )
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        rows, plan, dtype = request.param
        _, tensors = made(plan, packed=rows > 1)
        bias = inputs(37, dtype=dtype, seed=3).requires_grad_()
        return inputs(rows, 96, dtype=dtype).requires_grad_(), list(tensors), bias, plan

    def assert_agrees(self, found: Tensor, expected: Tensor, call: tuple[Any, ...], name: str) -> None:
        x, tensors, _, plan = call
        spec = weight_of(plan)
        # Both round between factors and at the end, and where they differ there a code of int8 may be the next one.
        magnitude = x.detach().double().abs() @ spec.magnitude(*tensors).double().T
        bound = (2 * spec.tolerance(x.dtype) + (2.0**-7 if "by int8" in plan else 0)) * magnitude
        slack = torch.finfo(x.dtype).eps * expected.detach().double().abs() + 2.0**-22
        assert ((found.double() - expected.double()).abs() <= bound + slack).all(), name
