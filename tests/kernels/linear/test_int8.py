"""linear_coded_int8: x is rounded as the format int8:row writes it, and then every kernel gives the same bits."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.kernels.linear.test_coded import FLOATS, Stored, decoded, inputs, packed, stored
from tests.laws.kernel_laws import KernelLaws
from torch import Tensor

from parco import _C, decode, encode, machine
from parco.kernels import table
from parco.kernels.linear import coded, linear_coded, linear_coded_int8
from parco.kernels.linear.launches import Compiled
from parco.kernels.linear.storage import storage

FORMATS = [
    *(f"int{bits}:{rest}" for bits in range(2, 9) for rest in ("32", "48:asym", "row:asym")),
    "int8:row", "int8:128", "int8:tensor", "int4:16", "int4:32x32:asym", "int3:160:asym:fp32", "ternary", "ternary:32",
    "ternary5", "fp4_e2m1", "fp6_e2m3:128", "mxfp4", "mxfp6_e2m3", "nvfp4", "nvfp4:16x16",
]  # fmt: skip


def compiled() -> Iterator[tuple[str, Compiled]]:
    """Every compiled kernel that this machine runs, and the tiles emulated where VBMI is there."""
    for kernel in table.operations()["linear_coded_int8"].kernels[:-1]:
        if kernel.isa in machine.detect().isas:
            assert isinstance(kernel.run, Compiled)
            yield kernel.name, kernel.run
    if "avx512_vbmi" in machine.detect().isas:
        yield "amx, emulated", Compiled(_C.int_amx_emulated, int8=True)


def assert_is_the_product_of_int8(
    y: Tensor, x: Tensor, tensors: Stored, format: str, columns: int, bias: Tensor | None = None
) -> None:
    """Exact sums of each group, so what is rounded is, for each group: the sum as fp32, two products of scales, and an
    fma; then x's scale, the row's, the bias, and the result. Each is 2^-24 of the sum of magnitudes.
    """
    rounded, weight = decode(encode(x, "int8:row")).double(), decoded(tensors, format, columns)
    expected = rounded @ weight.T + (0 if bias is None else bias.double())
    size = rounded.abs() @ weight.abs().T + (0 if bias is None else bias.double().abs())
    bound = (columns / 16 + 10) * 2.0**-24 * size
    last = torch.finfo(x.dtype).eps / 2 * (expected.abs() + bound)
    assert ((y.double() - expected).abs() <= bound + last).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_every_kernel_multiplies_what_int8_keeps_of_x_and_gives_the_same_bits(format: str, dtype: torch.dtype) -> None:
    for outputs, columns in ((37, 96), (33, 131), (37, 517), (3, 1), (18, 1280)):
        tensors = stored(format, outputs, columns)
        bias = inputs(outputs, dtype=dtype, seed=3)
        for rows in (35, 9, 3):
            x = inputs(rows, columns, dtype=dtype)
            same = None
            for name, run in compiled():
                y = run(x, *tensors, bias, format, columns)
                assert_is_the_product_of_int8(y, x, tensors, format, columns, bias)
                same = y if same is None else same
                assert torch.equal(y, same), name
                if storage(format).packs((outputs, columns)):
                    panels = packed(tensors, format, (outputs, columns))
                    assert torch.equal(run(x, *panels, bias, format, columns, outputs), same), f"{name}, packed"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("format", ["int4:32", "int8:row", "int3:64", "mxfp4", "int8:128:asym"])
def test_a_row_depends_neither_on_the_rows_beside_it_nor_on_the_threads(format: str, dtype: torch.dtype) -> None:
    tensors = stored(format, 530, 416)
    panels = packed(tensors, format, (530, 416))
    x = inputs(1100, 416, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = linear_coded_int8(x, *tensors, None, format, 416)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (1, 2, 5, 8, 9, 13, 16, 41, 1100):
                for own in (tensors, panels):
                    assert torch.equal(linear_coded_int8(x[:rows], *own, None, format, 416, 530), whole[:rows])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("rows", [1, 12, 40])
def test_the_codes_of_x_are_those_of_the_format(rows: int) -> None:
    """Times the identity as int2 (codes 2 stand for 0, 3 for 1) the product is int8(x) itself, without a rounding."""
    codes = torch.full((64, 64), 0, dtype=torch.uint8)
    codes[:] = 2
    codes.fill_diagonal_(3)
    packed_codes = (codes.view(64, 16, 4) << torch.tensor([0, 2, 4, 6], dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    scale = torch.ones(64, 1)
    generator = torch.Generator().manual_seed(4)
    for magnitude in (1.0, 1e-30, 1e-44, 1e30, 0.0):
        x = torch.randn(rows, 64, generator=generator) * magnitude
        x[0, :32] = torch.arange(32) * 127.5 / 127 * magnitude  # halves of steps
        expected = decode(encode(x, "int8:row"))
        for name, run in compiled():
            assert torch.equal(run(x, packed_codes, scale, None, None, None, "int2:row", 64), expected), name


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [3, 20])
def test_a_row_that_is_not_finite_becomes_nan_and_harms_no_other(rows: int, bad: float, dtype: torch.dtype) -> None:
    tensors = stored("int4:32", 20, 96)
    x = inputs(rows, 96, dtype=dtype)
    clean = linear_coded_int8(x, *tensors, None, "int4:32", 96)
    x[1, 40] = bad
    others = [row for row in range(rows) if row != 1]
    for name, run in compiled():
        y = run(x, *tensors, None, "int4:32", 96)
        assert y[1].isnan().all(), name
        assert torch.equal(y[others], clean[others]), name
    reference = table.operations()["linear_coded_int8"].kernels[-1].run(x, *tensors, None, "int4:32", 96)
    assert reference[1].isnan().all()
    assert reference[others].isfinite().all()


@pytest.mark.parametrize("rows", [2, 18])
def test_the_largest_sums_do_not_overflow(rows: int) -> None:
    """All codes 255 over zero 0, all of x the same: 255 * 127 * 65536 is below 2^31; the columns beyond are apart."""
    columns = 65536 + 128
    codes, scale = torch.full((17, columns), 255, dtype=torch.uint8), torch.full((17, 1), 2.0**-16)
    zero = torch.zeros(17, 1, dtype=torch.uint8)
    for value in (127.0, -127.0):
        x = torch.full((rows, columns), value)
        for name, run in compiled():
            y = run(x, codes, scale, zero, None, None, "int8:row:asym", columns)
            torch.testing.assert_close(y, torch.full_like(y, value * 255 * columns / 2**16), rtol=1e-6, atol=0), name


@pytest.mark.parametrize("format", ["nf4:64", "fp8_e4m3:row", "int8:column", "int4:1"])
def test_formats_without_small_integers_are_refused(format: str) -> None:
    tensors = stored(format, 16, 96)
    with pytest.raises(ValueError, match=f"linear_coded_int8: format='{format}' does not multiply int8"):
        linear_coded_int8(inputs(2, 96), *tensors, None, format, 96)


def test_the_arguments_are_checked() -> None:
    tensors = stored("int8:row", 16, 96)
    with pytest.raises(TypeError, match=r"linear_coded_int8: x is torch\.int8"):
        linear_coded_int8(torch.zeros(2, 96, dtype=torch.int8), *tensors, None, "int8:row", 96)
    with pytest.raises(ValueError, match="linear_coded_int8: x has the shape"):
        linear_coded_int8(inputs(2, 95), *tensors, None, "int8:row", 96)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_gradient_passes_the_rounding_as_if_it_were_not_there(dtype: torch.dtype) -> None:
    tensors = stored("int4:32", 40, 96)
    gradients = []
    for operation in (linear_coded, linear_coded_int8):
        x, bias = inputs(3, 96, dtype=dtype).requires_grad_(), inputs(40, dtype=dtype, seed=3).requires_grad_()
        y = operation(x, *tensors, bias, "int4:32", 96)
        gradients.append(torch.autograd.grad(y, (x, bias), inputs(3, 40, dtype=dtype, seed=4)))
    assert all(torch.equal(plain, through) for plain, through in zip(*gradients, strict=True))


def test_empty_inputs_and_leading_dimensions() -> None:
    tensors = stored("int4:32", 40, 96)
    assert linear_coded_int8(inputs(0, 96), *tensors, None, "int4:32", 96).shape == (0, 40)
    x = inputs(2, 3, 96)
    flat = linear_coded_int8(x.reshape(6, 96), *tensors, None, "int4:32", 96)
    assert torch.equal(linear_coded_int8(x, *tensors, None, "int4:32", 96), flat.reshape(2, 3, 40))


class TestLinearCodedInt8(KernelLaws):
    operation = "linear_coded_int8"

    @pytest.fixture(
        params=[
            (1, "int4:32", torch.bfloat16),
            (17, "int8:row", torch.float32),
            (3, "int3:32:asym", torch.float16),
            (2, "nvfp4", torch.bfloat16, "packed"),
            (20, "int8:row", torch.bfloat16, "packed"),
        ],
        ids=str,
    )
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        rows, format, dtype, *panels = request.param
        x = inputs(rows, 96, dtype=dtype).requires_grad_()
        tensors, bias = stored(format, 21, 96), inputs(21, dtype=dtype).requires_grad_()
        if panels:
            return x, *packed(tensors, format, (21, 96)), bias, format, 96, 21
        return x, *tensors, bias, format, 96, 0

    def assert_agrees(self, found: Tensor, expected: Tensor, call: tuple[Any, ...], name: str) -> None:
        x, *tensors, bias, format, columns, outputs = call
        if outputs:
            tensors = stored(format, outputs, columns)
        for y in (found, expected):
            assert_is_the_product_of_int8(y.detach(), x.detach(), tuple(tensors), format, columns, bias.detach())


def test_explain_says_that_x_becomes_int8() -> None:
    (explanation,) = table.explain("linear_coded_int8", inputs(2, 96), *stored("int4:32", 40, 96), None, "int4:32", 96)
    assert isinstance(explanation.call, coded.CodedCall)
    assert "2 rows of torch.float32 as int8 x int4:32" in str(explanation)
