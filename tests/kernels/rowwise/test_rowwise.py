"""Norms, gated, rotate and attend: every kernel against fp64 within its dtype's rounding, derivatives, errors."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.laws.kernel_laws import KernelLaws, several
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from parco import machine
from parco.kernels import table
from parco.kernels.rowwise import ACTIVATIONS, attend, dropout, gated, layer_norm, rms_norm, rotate

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def usable(operation: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    for kernel in table.operations()[operation].kernels:
        if kernel.isa == table.TORCH or kernel.isa in machine.detect().isas:
            yield kernel.name, kernel.run


def assert_rounded(found: Tensor, expected: Tensor, error: float, name: str) -> None:
    """`expected`, fp64, within `error` relative to it and one rounding of found's dtype."""
    tiny = torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps
    bound = (error + torch.finfo(found.dtype).eps / 2 * 1.01) * expected.abs() + error * 1e-2 + tiny
    excess = (found.double() - expected).abs() - bound
    assert excess.max() <= 0, f"{name}: {excess.max()} beyond"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("columns", [1, 8, 37, 2048])
def test_rms_norm_of_every_kernel(columns: int, dtype: torch.dtype) -> None:
    x, weight = inputs(2, 5, columns, dtype=dtype) * 3, inputs(columns, dtype=dtype, seed=4)
    wide = x.double()
    quotient = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    for name, run in usable("rms_norm"):
        assert_rounded(run(x, weight, 1e-5, 1.0, False), quotient * (weight.double() + 1), 2e-6, name)
        twice = run(x, weight, 1e-5, 0.0, True)
        assert_rounded(twice, quotient * weight.double(), 2e-6 + torch.finfo(dtype).eps / 2, name)
        assert torch.equal(run(x[1, 2], weight, 1e-5, 0.0, True), twice[1, 2]), f"{name}: a row alone"
    assert rms_norm(x[:0], weight).shape == (0, 5, columns)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("columns", [1, 8, 37, 2048])
def test_layer_norm_of_every_kernel(columns: int, dtype: torch.dtype) -> None:
    x, weight = inputs(2, 5, columns, dtype=dtype) * 3 + 7, inputs(columns, dtype=dtype, seed=4)
    bias = inputs(columns, dtype=dtype, seed=5)
    centered = x.double() - x.double().mean(-1, keepdim=True)
    scale = 1 / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    scaled = centered * scale * weight.double()
    # The mean is summed in fp32 of numbers around 7, and what it is off by is scaled; and the sum may cancel.
    slack = 2.0**-23 * (4 + x.double().abs().amax(-1, keepdim=True) * scale * weight.double().abs())
    for name, run in usable("layer_norm"):
        for expected, found in (
            (scaled, run(x, weight, None, 1e-5)),
            (scaled + bias.double(), run(x, weight, bias, 1e-5)),
        ):
            bound = slack + 2e-6 * scaled.abs() + torch.finfo(dtype).eps / 2 * 1.01 * expected.abs()
            assert ((found.double() - expected).abs() <= bound + torch.finfo(dtype).smallest_normal).all(), name
            assert torch.equal(run(x[1, 2], weight, bias, 1e-5), run(x, weight, bias, 1e-5)[1, 2]), f"{name}: a row"
    assert layer_norm(x[:0], weight).shape == (0, 5, columns)


def test_rms_norm_is_llamas_bit_for_bit_in_bf16() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(640, eps=1e-5).bfloat16()
    norm.weight.data = inputs(640, dtype=torch.bfloat16, seed=9)
    x = inputs(200, 640, dtype=torch.bfloat16) * 4
    for _, run in usable("rms_norm"):
        differ = (run(x, norm.weight, 1e-5, 0.0, True) != norm(x)).float().mean()
        assert differ < 1e-3  # the mean is summed in another order, which now and then crosses a tie


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_of_every_kernel(activation: str, dtype: torch.dtype) -> None:
    gate, up = inputs(3, 333, dtype=dtype) * 4, inputs(3, 333, dtype=dtype, seed=5)
    expected = ACTIVATIONS[activation](gate.double()) * up.double()
    for name, run in usable("gated"):
        if name != "gated-torch" or "gelu" not in activation:  # PyTorch's loses figures where 1 + erf cancels
            assert_rounded(run(gate, up, activation), expected, 6e-6, name)


@pytest.mark.parametrize("shape", [(5, 37), (2, 3, 19), (4, 1, 8), (1, 1, 70), (0, 6)])
def test_gated_of_halves_and_other_views(shape: tuple[int, ...]) -> None:
    both = torch.randn(*shape[:-1], 2 * shape[-1])
    gate, up = both.chunk(2, dim=-1)
    turned = torch.randn(*shape).mT.contiguous().mT
    for name, run in usable("gated"):
        if name == "gated-torch":
            continue  # whose last bits depend on where a row ends
        expected = run(gate.contiguous(), up.contiguous(), "silu")
        for views in ((gate, up), (gate, up.contiguous()), (gate.contiguous(), up)):
            found = run(*views, "silu")
            assert torch.equal(found, expected), name
            assert found.is_contiguous()
        assert torch.equal(run(turned, up, "relu"), run(turned.contiguous(), up.contiguous(), "relu")), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_at_the_ends(activation: str) -> None:
    gate = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 90.0, -90.0, 1e4, -1e4, float("nan"), float("inf")])
    for name, run in usable("gated"):
        found = run(gate, torch.ones_like(gate), activation)
        wanted = ACTIVATIONS[activation](gate[:-1])
        if name != "gated-torch":  # PyTorch's GELU of infinity is NaN or not, by version
            assert found[-1] == float("inf"), name
        found = found[:-1]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-30, equal_nan=True, msg=f"{name}: {found}")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("columns", "turning"), [(64, 64), (12, 12), (80, 20), (6, 2)])
def test_rotate_of_every_kernel(columns: int, turning: int, dtype: torch.dtype) -> None:
    q = inputs(2, 7, 3, columns, dtype=dtype).transpose(1, 2)
    k = inputs(2, 1, 7, columns, dtype=dtype, seed=3)
    for batch in (1, 2):
        cos, sin = (inputs(batch, 7, turning, dtype=dtype, seed=seed) for seed in (4, 5))
        for name, run in usable("rotate"):
            for x, found in zip((q, k), run(q, k, cos, sin), strict=True):
                low, high = x[..., :turning].double().chunk(2, -1)
                terms = (
                    x[..., :turning].double() * cos.double()[:, None],
                    torch.cat((-high, low), -1) * sin.double()[:, None],
                )
                slack = 2.0**-22 * (terms[0].abs() + terms[1].abs())
                expected = terms[0] + terms[1]
                bound = slack + torch.finfo(dtype).eps / 2 * 1.01 * expected.abs() + torch.finfo(dtype).smallest_normal
                assert ((found[..., :turning].double() - expected).abs() <= bound).all(), name
                assert torch.equal(found[..., turning:], x[..., turning:]), name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("heads", "key_heads", "count", "columns"), [(4, 4, 1, 16), (7, 1, 21, 12), (6, 2, 50, 64), (10, 2, 333, 5)]
)
def test_attend_of_every_kernel(heads: int, key_heads: int, count: int, columns: int, dtype: torch.dtype) -> None:
    q = inputs(2, heads, columns, dtype=dtype)
    room = [inputs(2, key_heads, count + 9, columns, dtype=dtype, seed=seed) for seed in (3, 4)]
    keys, values = (x[:, :, :count] for x in room)
    wide = (
        keys.double().repeat_interleave(heads // key_heads, 1),
        values.double().repeat_interleave(heads // key_heads, 1),
    )
    p = torch.softmax(torch.einsum("bhc,bhtc->bht", q.double(), wide[0]) * 0.3, -1)
    expected = torch.einsum("bht,bhtc->bhc", p, wide[1])
    # A score's error, some units of its terms' sum, is the relative error of its probability; and so many values are
    # summed.
    error = 2.0**-24 * (8 + 2 * columns**0.5 + 2 * count**0.5) * 8
    magnitude = torch.einsum("bht,bhtc->bhc", p, wide[1].abs())
    for name, run in usable("attend"):
        found = run(q, keys, values, 0.3)
        bound = (
            error * magnitude + torch.finfo(dtype).eps / 2 * 1.01 * expected.abs() + torch.finfo(dtype).smallest_normal
        )
        assert ((found.double() - expected).abs() <= bound).all(), name
        if name != "attend-torch":
            assert torch.equal(run(q[1:], keys[1:], values[1:], 0.3), found[1:]), f"{name}: a sequence alone"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_attend_with_capped_scores(dtype: torch.dtype) -> None:
    q, keys, values = (inputs(2, *shape, dtype=dtype, seed=5) for shape in ((6, 12), (2, 70, 12), (2, 70, 12)))
    wide = [x.double().repeat_interleave(3, 1) for x in (keys, values)]
    raw = torch.einsum("bhc,bhtc->bht", q.double(), wide[0])
    for scale, cap in ((0.02, 1.0), (0.3, 0.7), (2.0, 30.0), (9.0, 2.0)):
        p = torch.softmax(cap * torch.tanh(raw * scale / cap), -1)
        expected, magnitude = (torch.einsum("bht,bhtc->bhc", p, x) for x in (wide[1], wide[1].abs()))
        # tanh is exact to a unit or two of fp32, of which the cap makes so many of a score.
        error = 2.0**-23 * (60 + 8 * cap)
        for name, run in usable("attend"):
            off = (run(q, keys, values, scale, cap).double() - expected).abs()
            assert (off <= error * magnitude + torch.finfo(dtype).eps / 2 * 1.01 * expected.abs() + 1e-7).all(), name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_attend_with_sinks(dtype: torch.dtype) -> None:
    """Of heads of queries in fours, twos and ones; sinks far below and far above the scores."""
    q, keys, values = (inputs(2, *shape, dtype=dtype, seed=5) for shape in ((14, 12), (2, 70, 12), (2, 70, 12)))
    wide = [x.double().repeat_interleave(7, 1) for x in (keys, values)]
    scores = torch.einsum("bhc,bhtc->bht", q.double(), wide[0]) * 0.3
    sinks = torch.linspace(-90, 40, 14).to(dtype)
    p = torch.softmax(torch.cat([scores, sinks.double().view(1, -1, 1).expand(2, -1, 1)], -1), -1)[..., :-1]
    expected, magnitude = (torch.einsum("bht,bhtc->bhc", p, x) for x in (wide[1], wide[1].abs()))
    for name, run in usable("attend"):
        off = (run(q, keys, values, 0.3, 0.0, sinks).double() - expected).abs()
        bound = 2.0**-17 * magnitude + torch.finfo(dtype).eps / 2 * 1.01 * expected.abs()
        assert (off <= bound + torch.finfo(dtype).smallest_normal).all(), name


def test_attend_keeps_to_large_scores_and_shows_nans() -> None:
    q, keys, values = torch.full((1, 1, 4), 50.0), torch.randn(1, 1, 40, 4) * 20, torch.randn(1, 1, 40, 4)
    best = int((keys[0, 0] @ q[0, 0]).argmax())
    for name, run in usable("attend"):
        torch.testing.assert_close(run(q, keys, values, 1.0)[0, 0], values[0, 0, best], msg=name)
        assert run(q * float("nan"), keys, values, 1.0).isnan().all(), name


def test_derivatives_of_attend() -> None:
    q, keys, values = (
        inputs(2, *shape, seed=i).requires_grad_() for i, shape in enumerate(((6, 5), (2, 9, 5), (2, 9, 5)))
    )
    grad = inputs(2, 6, 5, seed=6)
    found = torch.autograd.grad(attend(q, keys, values, 0.4), (q, keys, values), grad)
    plain = functional.scaled_dot_product_attention(q[:, :, None], keys, values, scale=0.4, enable_gqa=True)[:, :, 0]
    torch.testing.assert_close(found, torch.autograd.grad(plain, (q, keys, values), grad))
    found = torch.autograd.grad(attend(q, keys, values, 0.4, 0.5), (q, keys, values), grad)
    wide = [x.repeat_interleave(3, 1) for x in (keys, values)]
    scores = 0.5 * torch.tanh(torch.einsum("bhc,bhtc->bht", q, wide[0]) * 0.4 / 0.5)
    plain = torch.einsum("bht,bhtc->bhc", scores.softmax(-1), wide[1])
    torch.testing.assert_close(found, torch.autograd.grad(plain, (q, keys, values), grad))
    sinks = inputs(6, seed=7).requires_grad_()
    scores = 0.5 * torch.tanh(torch.einsum("bhc,bhtc->bht", q, keys.repeat_interleave(3, 1)) * 0.4 / 0.5)
    found = torch.autograd.grad(attend(q, keys, values, 0.4, 0.5, sinks), (q, keys, values, sinks), grad)
    shares = torch.cat([scores, sinks.view(1, 6, 1).expand(2, 6, 1)], -1).softmax(-1)[..., :-1]
    plain = torch.einsum("bht,bhtc->bhc", shares, values.repeat_interleave(3, 1))
    torch.testing.assert_close(found, torch.autograd.grad(plain, (q, keys, values, sinks), grad))


def test_results_do_not_depend_on_the_threads() -> None:
    gate, x, weight = inputs(700, 300), inputs(700, 300), inputs(300)
    q, cos = inputs(1, 4, 300, 64), inputs(1, 300, 64)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            attended = attend(gate.view(1, 700, 300), x.view(1, 7, 100, 300), x.view(1, 7, 100, 300), 0.1)
            norms = rms_norm(x, weight), layer_norm(x, weight, weight)
            results.append((gated(gate, x, "silu"), *norms, *rotate(q, q, cos, cos), attended))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_of_gated(activation: str) -> None:
    gate, up = (inputs(4, 9, seed=seed).requires_grad_() for seed in (1, 2))
    grad = inputs(4, 9, seed=3)
    found = torch.autograd.grad(gated(gate, up, activation), (gate, up), grad)
    expected = torch.autograd.grad(ACTIVATIONS[activation](gate) * up, (gate, up), grad)
    torch.testing.assert_close(found, expected)


def test_derivatives_of_rms_norm() -> None:
    x, weight = inputs(4, 9).requires_grad_(), inputs(9, seed=3).requires_grad_()
    grad = inputs(4, 9, seed=5)
    found = torch.autograd.grad(rms_norm(x, weight, 1e-4, 1.0), (x, weight), grad)
    expected = torch.autograd.grad(functional.rms_norm(x, (9,), None, 1e-4) * (weight + 1), (x, weight), grad)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("biased", [True, False])
def test_derivatives_of_layer_norm(biased: bool) -> None:
    x, weight, bias = (inputs(*shape, seed=i).requires_grad_() for i, shape in enumerate(((4, 9), (9,), (9,))))
    leaves = (x, weight, bias) if biased else (x, weight)
    grad = inputs(4, 9, seed=5)
    found = torch.autograd.grad(layer_norm(x, weight, bias if biased else None, 1e-4), leaves, grad)
    plain = functional.layer_norm(x, (9,), weight, bias if biased else None, 1e-4)
    torch.testing.assert_close(found, torch.autograd.grad(plain, leaves, grad))


def test_derivatives_of_rotate() -> None:
    q, k = inputs(2, 3, 5, 12).requires_grad_(), inputs(2, 1, 5, 12, seed=3).requires_grad_()
    cos, sin = inputs(1, 5, 8, seed=4), inputs(1, 5, 8, seed=5)
    grads = inputs(2, 3, 5, 12, seed=6), inputs(2, 1, 5, 12, seed=7)

    def plain(x: Tensor) -> Tensor:
        low, high = x[..., :8].chunk(2, -1)
        return torch.cat((x[..., :8] * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None], x[..., 8:]), -1)

    found = torch.autograd.grad(rotate(q, k, cos, sin), (q, k), grads)
    torch.testing.assert_close(found, torch.autograd.grad((plain(q), plain(k)), (q, k), grads))


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


HEADS = (zeros(1, 2, 3, 8), zeros(1, 2, 3, 8))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rms_norm(zeros(2, 8), zeros(7)), ValueError, "weight has the shape"),
        (lambda: rms_norm(zeros(2, 8), zeros(8).bfloat16()), TypeError, "weight is torch.bfloat16"),
        (lambda: rms_norm(zeros(2, 8).double(), zeros(8)), TypeError, "x is torch.float64"),
        (lambda: layer_norm(zeros(2, 8), zeros(7)), ValueError, "weight has the shape"),
        (lambda: layer_norm(zeros(2, 8), zeros(8), zeros(1, 8)), ValueError, "bias has the shape"),
        (lambda: layer_norm(zeros(2, 8), zeros(8), zeros(8).half()), TypeError, "bias is torch.float16"),
        (lambda: layer_norm(zeros(2, 8).double(), zeros(8)), TypeError, "x is torch.float64"),
        (lambda: attend(zeros(1, 2, 8), *HEADS, 1.0, -1.0), ValueError, "softcap=-1.0; a positive number"),
        (lambda: gated(zeros(8), zeros(7), "silu"), ValueError, "up has the shape"),
        (lambda: gated(zeros(8), zeros(8).half(), "silu"), TypeError, "up is torch.float16"),
        (lambda: gated(zeros(8), zeros(8), "swish"), ValueError, "activation='swish'; one of silu"),
        (lambda: rotate(*HEADS, zeros(1, 3, 7), zeros(1, 3, 7)), ValueError, "cos has 7 columns"),
        (lambda: rotate(*HEADS, zeros(1, 3, 10), zeros(1, 3, 10)), ValueError, "cos has 10 columns"),
        (lambda: rotate(*HEADS, zeros(1, 3, 8), zeros(1, 3, 6)), ValueError, "sin has the shape"),
        (lambda: rotate(zeros(2, 3, 8), *[zeros(1, 3, 8)] * 3), ValueError, "q has the shape"),
        (lambda: rotate(HEADS[0], zeros(1, 2, 4, 8), *[zeros(1, 3, 8)] * 2), ValueError, "k has the shape"),
        (lambda: rotate(*HEADS, zeros(1, 3, 8).half(), zeros(1, 3, 8)), TypeError, "cos is torch.float16"),
        (lambda: attend(HEADS[0], *HEADS, 1.0), ValueError, "q has the shape"),
        (lambda: attend(zeros(1, 2, 8), *HEADS, 1.0, 0.0, zeros(3)), ValueError, "one for each of 2 heads is needed"),
        (lambda: attend(zeros(1, 2, 8), *HEADS, 1.0, 0.0, zeros(2).half()), TypeError, "sinks is torch.float16"),
        (lambda: attend(zeros(1, 3, 8), *HEADS, 1.0), ValueError, "keys has 2 heads; a divisor of 3"),
        (lambda: attend(zeros(1, 2, 6), *HEADS, 1.0), ValueError, "keys has the shape"),
        (lambda: attend(zeros(1, 2, 8), HEADS[0][:, :, :0], HEADS[0], 1.0), ValueError, "at least 1"),
        (lambda: attend(zeros(1, 2, 8), HEADS[0], zeros(1, 2, 4, 8), 1.0), ValueError, "values has the shape"),
        (lambda: attend(zeros(1, 2, 8), HEADS[0], HEADS[0].half(), 1.0), TypeError, "values is torch.float16"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


class TestRmsNorm(KernelLaws):
    operation = "rms_norm"

    @pytest.fixture(params=[(torch.float32, True), (torch.bfloat16, False)], ids=str)
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        dtype, rounded = request.param
        return (
            inputs(3, 4, 50, dtype=dtype).requires_grad_(),
            inputs(50, dtype=dtype).requires_grad_(),
            1e-5,
            1.0,
            rounded,
        )


class TestLayerNorm(KernelLaws):
    operation = "layer_norm"

    @pytest.fixture(params=[(torch.float32, True), (torch.bfloat16, False)], ids=str)
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        dtype, biased = request.param
        x, weight, bias = (inputs(*shape, dtype=dtype, seed=7).requires_grad_() for shape in ((3, 4, 50), (50,), (50,)))
        return x, weight, bias if biased else None, 1e-5


class TestGated(KernelLaws):
    operation = "gated"

    @pytest.fixture(params=[("silu", torch.float32), ("gelu_tanh", torch.bfloat16), ("gelu", torch.float16)], ids=str)
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        activation, dtype = request.param
        return (
            inputs(3, 50, dtype=dtype).requires_grad_(),
            inputs(3, 50, dtype=dtype, seed=3).requires_grad_(),
            activation,
        )


class TestRotate(KernelLaws):
    operation = "rotate"

    @pytest.fixture(params=[(torch.float32, 12), (torch.bfloat16, 8)], ids=str)
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        dtype, turning = request.param
        q, k = inputs(2, 3, 5, 12, dtype=dtype), inputs(2, 1, 5, 12, dtype=dtype, seed=3)
        angles = (inputs(1, 5, turning, dtype=dtype, seed=seed) for seed in (4, 5))
        return q.requires_grad_(), k.requires_grad_(), *angles


class TestAttend(KernelLaws):
    operation = "attend"

    @pytest.fixture(params=[(torch.float32, 2, False), (torch.bfloat16, 1, False), (torch.float32, 1, True)], ids=str)
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        dtype, key_heads, sinks = request.param
        shapes = ((2, 6, 12), (2, key_heads, 7, 12), (2, key_heads, 7, 12))
        tensors = (inputs(*shape, dtype=dtype, seed=i).requires_grad_() for i, shape in enumerate(shapes))
        more = (inputs(6, dtype=dtype, seed=9).requires_grad_(),) if sinks else ()
        return *tensors, 0.25, 0.0 if dtype == torch.float32 else 0.5, *more


def calls() -> dict[str, Callable[[], Any]]:
    x, weight, heads, angles = inputs(3, 8), inputs(8), inputs(1, 2, 3, 8), inputs(1, 3, 8)
    query, seed = inputs(1, 4, 8), torch.tensor([1])
    return {
        "rms_norm": lambda: rms_norm(x, weight),
        "layer_norm": lambda: layer_norm(x, weight, weight),
        "gated": lambda: gated(x, x, "silu"),
        "dropout": lambda: dropout(x, seed, 0.5),
        "rotate": lambda: rotate(heads, heads, angles, angles),
        "attend": lambda: attend(query, heads, heads, 0.5),
    }


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", calls())
def test_without_gradients_the_dispatcher_is_left_out_unless_somebody_watches(name: str) -> None:
    call = calls()[name]
    expected = several(call())
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(several(call()), expected, strict=True))
        with Watch() as watch:
            call()
        assert watch.seen == [f"parco::{name}"]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call()
        assert f"parco::{name}" in {event.key for event in profile.key_averages()}
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(inputs(3, 8)), mode.from_tensor(inputs(8))]
            assert rms_norm(*fakes).shape == (3, 8)
        with pytest.raises(TypeError, match="weight is"):
            rms_norm(inputs(3, 8), inputs(8).bfloat16())
    with torch.inference_mode():
        assert several(call())[0].is_inference()
