"""linear_int: the same bits from every instruction set, batch size and thread count, and two errors told apart."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.laws.kernel_laws import KernelLaws
from torch import Tensor

from parco import _C, machine
from parco.kernels import table
from parco.kernels.linear import embedding_int, integer, linear_int, reference
from parco.kernels.linear.integer import Compiled

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def stored(
    outputs: int,
    columns: int,
    bits: int,
    group: int,
    *,
    asymmetric: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random codes, scales of order 1/sqrt(columns) and zeros."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group)
    codes = torch.randint(0, 256, (outputs, -(-columns * bits // 8)), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(outputs, groups, generator=generator) + 0.5) * 2.0**-bits / columns**0.5
    zero = torch.randint(0, 1 << bits, (outputs, groups), dtype=torch.uint8, generator=generator)
    return codes, scale.to(dtype), zero if asymmetric else None


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compiled() -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """Every compiled kernel that this machine runs, and the tiles emulated where AVX-512 is there."""
    for kernel in table.operations()["linear_int"].kernels:
        if kernel.isa in machine.detect().isas:
            yield kernel.name, kernel.run
    if "avx512" in machine.detect().isas:
        yield "amx, emulated", Compiled(_C.linear_int_amx_emulated)


def product_bound(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, columns: int
) -> Tensor:
    """What a kernel may differ by from the product computed in fp64 with the dequantized weights.

    x: a word of its block keeps 2^-15 of the block's largest magnitude (bf16, fp16; the exponent may be one higher
    than the largest's, so half a unit is at most 2^-15) or 2^-29 (fp32). fp32: a conversion, the product of two
    scales and an fma per block, each 2^-24, relative to the sum of magnitudes. Then one rounding to x's dtype, half
    of its eps.
    """
    weight = reference.dequantize(codes, scale, zero, bits, group, columns, torch.float64).abs()
    wide = x.double().abs()
    amax = torch.zeros_like(wide)
    block = min(group, 128)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        amax[..., start:stop] = wide[..., start:stop].amax(-1, keepdim=True)
    kept = 2.0**-29 if x.dtype == torch.float32 else 2.0**-15
    blocks = -(-columns // block)
    return (kept * amax + (blocks + 3) * 2.0**-24 * wide) @ weight.T


def exact(x: Tensor, *arguments: Any, bias: Tensor | None = None) -> Tensor:
    weight = reference.dequantize(*arguments, torch.float64)
    return x.double() @ weight.T + (0 if bias is None else bias.double())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("columns", "group"), [(96, 32), (200, 48), (131, 131), (353, 32), (517, 160), (1, 1), (256, 128)]
)
def test_every_kernel_gives_the_same_bits_and_is_within_its_bound(
    bits: int, columns: int, group: int, dtype: torch.dtype
) -> None:
    asymmetric = (bits + columns) % 2 == 1
    tensors = stored(37, columns, bits, group, asymmetric=asymmetric)
    x = inputs(19, columns, dtype=dtype)
    bias = inputs(37, dtype=dtype, seed=3)
    arguments = (*tensors, bits, group, columns)
    found = {name: run(x, *tensors, bias, bits, group, columns) for name, run in compiled()}
    first = next(iter(found.values()))
    for name, y in found.items():
        assert torch.equal(y, first), f"{name} differs from {next(iter(found))}"
    expected = exact(x, *arguments, bias=bias)
    rounding = torch.finfo(dtype).eps / 2 * (expected.abs() + product_bound(x, *arguments))
    excess = (first.double() - expected).abs() - product_bound(x, *arguments) - rounding - 2.0**-23 * expected.abs()
    assert excess.max() <= 0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 416), (3, 64)])
def test_a_row_does_not_depend_on_the_rows_beside_it_nor_on_the_threads(
    bits: int, group: int, dtype: torch.dtype
) -> None:
    tensors = stored(530, 416, bits, group)
    x = inputs(389, 416, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = linear_int(x, *tensors, None, bits, group, 416)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (1, 2, 3, 4, 5, 7, 16, 41, 389):
                part = linear_int(x[:rows], *tensors, None, bits, group, 416)
                assert torch.equal(part, whole[:rows]), (count, rows)
    finally:
        torch.set_num_threads(threads)


def test_fp32_inputs_are_multiplied_at_fp32_grade() -> None:
    """Law 6: at most twice torch's own error, both against fp64."""
    tensors = stored(256, 1024, 4, 32, dtype=torch.float32)
    x = inputs(24, 1024)
    expected = exact(x, *tensors, 4, 32, 1024)
    weight = reference.dequantize(*tensors, 4, 32, 1024, torch.float32)
    ours = (linear_int(x, *tensors, None, 4, 32, 1024).double() - expected).norm()
    theirs = (torch.nn.functional.linear(x, weight).double() - expected).norm()
    assert ours <= 2 * theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_inputs_lose_no_more_than_torch_does(dtype: torch.dtype) -> None:
    """Law 6: at most twice torch's own error on the dequantized weights in x's dtype, both against fp64."""
    tensors = stored(256, 1024, 4, 32, dtype=torch.float32)
    x = inputs(24, 1024, dtype=dtype)
    expected = exact(x, *tensors, 4, 32, 1024)
    weight = reference.dequantize(*tensors, 4, 32, 1024, dtype)
    ours = (linear_int(x, *tensors, None, 4, 32, 1024).double() - expected).norm()
    theirs = (torch.nn.functional.linear(x, weight).double() - expected).norm()
    assert ours <= 2 * theirs


def test_one_large_input_does_not_swamp_the_other_blocks() -> None:
    tensors = stored(16, 256, 4, 32, dtype=torch.float32)
    x = inputs(2, 256, dtype=torch.bfloat16)
    x[:, 3] = 1e4
    expected = exact(x, *tensors, 4, 32, 256)
    y = linear_int(x.float(), *tensors, None, 4, 32, 256)
    assert ((y.double() - expected).abs() <= product_bound(x.float(), *tensors, 4, 32, 256)).all()
    x[:, 3] = 0
    calm = linear_int(x, *tensors, None, 4, 32, 256)
    assert ((calm.double() - exact(x, *tensors, 4, 32, 256)).abs().max()) < 2.0**-7


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_that_is_not_finite_becomes_nan_and_harms_no_other(bad: float, dtype: torch.dtype) -> None:
    tensors = stored(20, 96, 4, 32)
    x = inputs(3, 96, dtype=dtype)
    clean = linear_int(x, *tensors, None, 4, 32, 96)
    x[1, 40] = bad
    for name, run in compiled():
        y = run(x, *tensors, None, 4, 32, 96)
        assert y[1].isnan().all(), name
        assert torch.equal(y[[0, 2]], clean[[0, 2]]), name


@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e30])
def test_the_ends_of_the_range(magnitude: float) -> None:
    tensors = stored(9, 64, 8, 64, dtype=torch.float32)
    x = inputs(2, 64) * magnitude
    y = linear_int(x, *tensors, None, 8, 64, 64)
    torch.testing.assert_close(y.double(), exact(x, *tensors, 8, 64, 64), rtol=1e-5, atol=1e-6 * magnitude)


def test_the_largest_sums_do_not_overflow() -> None:
    """All codes 255 over zero 0, all words at their largest: 255 * 32639 * 128 is below 2^31."""
    codes = torch.full((17, 256), 255, dtype=torch.uint8)
    scale, zero = torch.full((17, 2), 2.0**-8), torch.zeros(17, 2, dtype=torch.uint8)
    for value in (1.984375, 1.9765625, 1.0, -1.984375):
        x = torch.full((18, 256), value, dtype=torch.bfloat16)
        for name, run in compiled():
            y = run(x.float(), codes, scale, zero, None, 8, 128, 256)
            assert torch.equal(y, torch.full_like(y, value * 255)), name
            assert torch.equal(run(x, codes, scale, zero, None, 8, 128, 256), y.bfloat16()), name


def test_shapes_strides_and_offsets() -> None:
    """Leading dimensions, no rows, strided inputs, and tensors that lie at odd addresses."""
    codes, scale, _ = stored(21, 96, 4, 32)
    x = inputs(2, 3, 96, dtype=torch.bfloat16)
    expected = linear_int(x.reshape(6, 96), codes, scale, None, None, 4, 32, 96)
    assert torch.equal(linear_int(x, codes, scale, None, None, 4, 32, 96), expected.reshape(2, 3, 21))
    assert linear_int(x[:0], codes, scale, None, None, 4, 32, 96).shape == (0, 3, 21)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(linear_int(strided, codes, scale, None, None, 4, 32, 96), expected.reshape(2, 3, 21))
    assert torch.equal(linear_int(x[0, 0], codes, scale, None, None, 4, 32, 96), expected[0])
    raw = torch.empty(codes.numel() + 1, dtype=torch.uint8)
    odd = raw[1:].view(21, 48)
    odd.copy_(codes)
    assert odd.data_ptr() % 2 == 1
    assert torch.equal(linear_int(x, odd, scale, None, None, 4, 32, 96), expected.reshape(2, 3, 21))


def test_one_scale_for_the_whole_matrix() -> None:
    codes, _, _ = stored(21, 96, 8, 96)
    one = torch.tensor([[0.01]])
    x = inputs(5, 96)
    y = linear_int(x, codes, one, None, None, 8, 96, 96)
    assert torch.equal(y, linear_int(x, codes, one.expand(21, 1).contiguous(), None, None, 8, 96, 96))


def test_gradients() -> None:
    tensors = stored(11, 64, 4, 32)
    x = inputs(5, 64).requires_grad_()
    bias = inputs(11).requires_grad_()
    grad = inputs(5, 11, seed=4)
    linear_int(x, *tensors, bias, 4, 32, 64).backward(grad)
    weight = reference.dequantize(*tensors, 4, 32, 64, torch.float32)
    torch.testing.assert_close(x.grad, grad @ weight)
    torch.testing.assert_close(bias.grad, grad.sum(0))


def test_compiles_without_a_graph_break() -> None:
    tensors = stored(11, 64, 4, 32)
    x = inputs(5, 64).requires_grad_()

    def layer(x: Tensor) -> Tensor:
        return torch.relu(linear_int(x, *tensors, None, 4, 32, 64)).sum()

    compiled_layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled_layer(x).backward()
    expected = x.grad
    x.grad = None
    layer(x).backward()
    assert torch.equal(x.grad, expected)


def test_other_devices_take_the_reference() -> None:
    tensors = [None if t is None else t.to("meta") for t in stored(11, 64, 4, 32)]
    y = linear_int(torch.empty(5, 64, device="meta", dtype=torch.bfloat16), *tensors, None, 4, 32, 64)
    assert (y.shape, y.dtype) == ((5, 11), torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 95)}, ValueError, "x has the shape"),
        ({"x": torch.zeros(2, 96, dtype=torch.float64)}, TypeError, "x is torch.float64"),
        ({"codes": torch.zeros(21, 47, dtype=torch.uint8)}, ValueError, "codes has the shape"),
        ({"codes": torch.zeros(21, 48, dtype=torch.int8)}, TypeError, "codes is torch.int8"),
        ({"scale": torch.zeros(21, 4)}, ValueError, "scale has the shape"),
        ({"scale": torch.zeros(1, 1)}, ValueError, "one scale for all"),
        ({"scale": torch.zeros(21, 3, dtype=torch.int32)}, TypeError, "scale is torch.int32"),
        ({"zero": torch.zeros(21, 1, dtype=torch.uint8)}, ValueError, "zero has the shape"),
        ({"bias": torch.zeros(20)}, ValueError, "bias has the shape"),
        ({"bits": 9}, ValueError, "bits=9"),
        ({"group": 24}, ValueError, "group=24"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    codes, scale, _ = stored(21, 96, 4, 32)
    arguments = {
        "x": torch.zeros(2, 96),
        "codes": codes,
        "scale": scale,
        "zero": None,
        "bias": None,
        "bits": 4,
        "group": 32,
    }
    with pytest.raises(error, match=message):
        linear_int(**(arguments | change), columns=96)


class TestLinearInt(KernelLaws):
    operation = "linear_int"

    @pytest.fixture(params=[(1, 4, 32, torch.bfloat16), (17, 8, 96, torch.float32), (3, 3, 32, torch.float16)], ids=str)
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        rows, bits, group, dtype = request.param
        codes, scale, zero = stored(21, 96, bits, group, asymmetric=bits == 3)
        x = inputs(rows, 96, dtype=dtype).requires_grad_()
        return x, codes, scale, zero, inputs(21, dtype=dtype).requires_grad_(), bits, group, 96

    def assert_agrees(self, found: Tensor, expected: Tensor, call: tuple[Any, ...], name: str) -> None:
        x, codes, scale, zero, _, bits, group, columns = call
        bound = product_bound(x.detach(), codes, scale, zero, bits, group, columns) * 2
        slack = torch.finfo(x.dtype).eps * expected.detach().double().abs() + 2.0**-22
        assert ((found.double() - expected.double()).abs() <= bound + slack).all(), name


def test_one_scale_does_not_serve_two_groups_even_of_one_row() -> None:
    codes, scale, _ = stored(1, 64, 4, 32)
    with pytest.raises(ValueError, match="one scale for all needs group=64"):
        linear_int(inputs(1, 64), codes, scale[:, :1].contiguous(), None, None, 4, 32, 64)
    with pytest.raises(ValueError, match="one scale for all needs group=64"):
        embedding_int(torch.tensor([0]), codes, scale[:, :1].contiguous(), None, 4, 32, 64, torch.float32)


def test_a_group_beyond_the_row_is_the_row() -> None:
    codes, scale, _ = stored(5, 48, 4, 48)
    x = inputs(3, 48).requires_grad_()
    grads = []
    for group in (48, sys.maxsize):
        y = linear_int(x, codes, scale, None, None, 4, group, 48)
        grads.append(torch.autograd.grad(y.sum(), x)[0])
        assert torch.equal(y, linear_int(x, codes, scale, None, None, 4, 48, 48))
    assert torch.equal(*grads)


def test_the_gradient_expands_a_part_of_the_matrix_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scale, _ = stored(37, 48, 4, 48)
    x, grad = inputs(3, 48).requires_grad_(), inputs(3, 37, seed=9)
    whole = torch.autograd.grad(linear_int(x, codes, scale, None, None, 4, 48, 48), x, grad)[0]
    monkeypatch.setattr(integer, "EXPANDED", 48 * 5)
    parts = torch.autograd.grad(linear_int(x, codes, scale, None, None, 4, 48, 48), x, grad)[0]
    torch.testing.assert_close(parts, whole)


def test_there_is_no_forward_derivative_and_that_is_said() -> None:
    codes, scale, _ = stored(5, 48, 4, 48)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda x: linear_int(x, codes, scale, None, None, 4, 48, 48), (inputs(3, 48),), (inputs(3, 48),))
