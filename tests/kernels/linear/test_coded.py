"""linear_coded: every format on every kernel within its bound, the same bits from all that compute in integers, and two
errors told apart.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from tests.laws.kernel_laws import KernelLaws
from torch import Tensor

from parco import _C, formats, machine
from parco.formats import Format
from parco.kernels import table
from parco.kernels.cast import decode_tensors
from parco.kernels.linear import coded, gradient, linear_coded, pack, unpack
from parco.kernels.linear.launches import Compiled
from parco.kernels.linear.storage import storage

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = [
    "int8:row", "int8:tensor", "int8:tensor:asym", "int8:column", "int4:column", "int4:32x32:asym", "int5:48:fp16",
    "int4:16", "int3:160:asym:fp32", "nf4:row", "nf4:64", "nf4:32:fp32", "nf4:column", "nf4:48", "ternary",
    "ternary:row", "ternary:32", "fp4_e2m1:row", "fp6_e2m3:128", "fp6_e2m3", "fp4_e2m1", "fp6_e3m2", "fp6_e3m2:16",
    "fp8_e4m3", "fp8_e5m2", "fp8_e4m3:row", "fp8_e5m2:row", "fp8_e4m3:column", "fp8_e4m3:1x128", "fp8_e5m2:128x128",
    "fp8_e4m3:128x128:pow2", "fp8_e4m3:16", "fp8_e4m3:tensor:delayed", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3",
    "mxfp6_e3m2", "mxfp4", "nvfp4", "nvfp4:16x16", "ternary5", "ternary5:32",
]  # fmt: skip
"""One of every kind of element, of block and of scale, and of every way through the kernels."""

INTEGERS = [f"int{bits}:{rest}" for bits in range(2, 9) for rest in ("32", "48:asym", "128:fp32", "row:asym")]

Stored = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""codes, scale, zero, global_scale"""


def stored(format: str, outputs: int, columns: int, *, seed: int = 1) -> Stored:
    """Random finite codes, with scales that make entries of order 1/sqrt(columns), and zeros."""
    form = Format.parse(format)
    generator = torch.Generator().manual_seed(seed)
    specs = form.tensors((outputs, columns))
    codes = torch.randint(0, 256, specs["codes"].shape, dtype=torch.uint8, generator=generator)
    values = torch.from_numpy(storage(format).values)
    if form.bits == 8:
        codes[~values[codes.long()].isfinite()] = 64
    if form.bits == 8 and isinstance(form.scale, formats.Unscaled | formats.ScaleE8M0):
        codes &= 0xBF  # below 2: sums that fp16 holds
    size = (values[values.isfinite()].abs().mean() * columns**0.5).item() if "scale" in specs else 1.0
    found: dict[str, Tensor] = {}
    for name, spec in specs.items():
        if name == "scale" and isinstance(form.scale, formats.ScaleE8M0):
            found[name] = torch.randint(118, 126, spec.shape, dtype=torch.uint8, generator=generator)
        elif name == "scale" and isinstance(form.scale, formats.ScaleE4M3):
            found[name] = torch.randint(0, 127, spec.shape, dtype=torch.uint8, generator=generator)
        elif name == "scale":
            found[name] = ((torch.rand(spec.shape, generator=generator) + 0.5) / size).to(spec.dtype)
        elif name == "zero":
            found[name] = torch.randint(0, 1 << form.bits, spec.shape, dtype=torch.uint8, generator=generator)
        elif name == "global_scale":
            found[name] = torch.tensor([0.0013])
    return codes, found.get("scale"), found.get("zero"), found.get("global_scale")


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compiled(format: str) -> Iterator[tuple[str, bool, Callable[..., Tensor]]]:
    """Every compiled kernel that takes `format` and that this machine runs, and the tiles emulated where VBMI is
    there; and whether it computes in integers.
    """
    for kernel in table.operations()["linear_coded"].kernels[:-1]:
        described = coded.CodedCall("cpu", kernel.isa, torch.float32, 16, 37, 4096, format)
        if kernel.isa in machine.detect().isas and kernel.refuses(described) is None:
            yield kernel.name, kernel.name.startswith("int"), kernel.run
    if "avx512_vbmi" in machine.detect().isas and storage(format).integers and not storage(format).refusal:
        yield "amx, emulated", True, Compiled(_C.int_amx_emulated)


def named(tensors: Stored) -> dict[str, Tensor]:
    names = ("codes", "scale", "zero", "global_scale")
    return {name: tensor for name, tensor in zip(names, tensors, strict=True) if tensor is not None}


def packed(tensors: Stored, format: str, shape: tuple[int, int]) -> Stored:
    found = pack(Format.parse(format), shape, named(tensors))
    return found["codes"], found.get("scale"), found.get("zero"), found.get("global_scale")


def laid_out(format: str, outputs: int, columns: int, tensors: Stored) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """Every compiled kernel over `tensors` by rows and, where there are some, in panels, as a function of x."""

    def over(run: Callable[..., Tensor], tensors: Stored, outputs: int = 0) -> Callable[..., Tensor]:
        return lambda x: run(x, *tensors, None, format, columns, outputs)

    for name, _, run in compiled(format):
        yield name, over(run, tensors)
        if storage(format).packs((outputs, columns)):
            yield f"{name}, packed", over(run, packed(tensors, format, (outputs, columns)), outputs)


def unpacked(tensors: Sequence[Tensor | None], format: str, shape: tuple[int, int]) -> Stored:
    found = unpack(Format.parse(format), shape, named(tuple(tensors)))
    return found["codes"], found.get("scale"), found.get("zero"), found.get("global_scale")


def decoded(tensors: Stored, format: str, columns: int) -> Tensor:
    return decode_tensors(format, (tensors[0].shape[0], columns), named(tensors)).double()


def product_bound(x: Tensor, tensors: Stored, format: str, columns: int) -> Tensor:
    """What a kernel may differ by from the product computed in fp64 with the decoded weights.

    In integers a word of its block keeps 2^-15 of the block's largest magnitude (bf16, fp16; the exponent may be one
    higher than the largest's, so half a unit is at most 2^-15) or 2^-29 (fp32, and what a column's scale multiplied),
    and each block costs a conversion and an fma, and two products of scales. In fp32 every term costs an fma:
    2 sqrt(K) of them with high probability. Each is 2^-24, relative to the sum of magnitudes.
    """
    weight = decoded(tensors, format, columns).abs()
    wide = x.double().abs()
    if storage(format).by_column:
        assert tensors[1] is not None
        scaled, factor = wide * tensors[1][0].double(), tensors[1][0].double()
    else:
        scaled, factor = wide, torch.ones(columns, dtype=torch.float64)
    amax = torch.zeros_like(wide)
    block = 16  # a block is as long as a group or longer; what its largest magnitude may be is asked of 128 columns
    for start in range(0, columns, block):
        near = scaled[..., max(0, start - 128) : start + 128]
        amax[..., start : start + block] = near.amax(-1, keepdim=True)
    kept = 2.0**-29 if x.dtype == torch.float32 or storage(format).by_column else 2.0**-15
    amax = torch.where(factor > 0, amax / factor, 0.0)
    return (kept * amax + (2 * columns**0.5 + columns / 16 + 5) * 2.0**-24 * wide) @ weight.T


def exact(x: Tensor, tensors: Stored, format: str, columns: int, bias: Tensor | None = None) -> Tensor:
    return x.double() @ decoded(tensors, format, columns).T + (0 if bias is None else bias.double())


def assert_within(y: Tensor, x: Tensor, tensors: Stored, format: str, columns: int, bias: Tensor | None = None) -> None:
    expected, bound = exact(x, tensors, format, columns, bias), product_bound(x, tensors, format, columns)
    rounding = torch.finfo(x.dtype).eps / 2 * (expected.abs() + bound) + 2.0**-23 * expected.abs()
    assert ((y.double() - expected).abs() - bound - rounding).max() <= 0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("format", [*INTEGERS, *BLOCKS])
def test_every_kernel_is_within_its_bound_and_those_in_integers_give_the_same_bits(
    format: str, dtype: torch.dtype
) -> None:
    for outputs, columns in ((37, 96), (5, 200), (33, 131), (37, 353), (40, 517), (3, 1), (37, 1280), (18, 320)):
        tensors = stored(format, outputs, columns)
        bias = inputs(outputs, dtype=dtype, seed=3)
        for rows in (19, 3):
            x = inputs(rows, columns, dtype=dtype)
            same = None
            for name, integers, run in compiled(format):
                y = run(x, *tensors, bias, format, columns)
                assert_within(y, x, tensors, format, columns, bias)
                if integers:
                    same = y if same is None else same
                    assert torch.equal(y, same), name
                if storage(format).packs((outputs, columns)):
                    panels = packed(tensors, format, (outputs, columns))
                    of_panels = run(x, *panels, bias, format, columns, outputs)
                    if integers:
                        assert torch.equal(of_panels, same), f"{name}, packed"
                    else:
                        assert_within(of_panels, x, tensors, format, columns, bias)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("format", ["int4:32", "int8:row", "int3:64", "fp4_e2m1:32", "ternary"])
def test_in_integers_a_row_depends_neither_on_the_rows_beside_it_nor_on_the_threads(
    format: str, dtype: torch.dtype
) -> None:
    tensors = stored(format, 530, 416)
    x = inputs(389, 416, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = linear_coded(x, *tensors, None, format, 416)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (1, 2, 3, 4, 5, 7, 16, 41, 389):
                part = linear_coded(x[:rows], *tensors, None, format, 416)
                assert torch.equal(part, whole[:rows]), (count, rows)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("format", ["fp8_e4m3:row", "mxfp8_e5m2", "nf4:64", "mxfp6_e3m2", "fp8_e4m3:128x128"])
def test_in_fp32_a_row_depends_on_neither_where_few_or_many_rows_are_multiplied(format: str) -> None:
    """Up to 8 rows weights are streamed, with more they are expanded first: two orders of summation, each its own."""
    tensors = stored(format, 530, 416)
    x = inputs(549, 416)
    threads = torch.get_num_threads()
    try:
        for name, integers, run in compiled(format):
            if integers:
                continue
            torch.set_num_threads(1)
            few, many = run(x[:8], *tensors, None, format, 416), run(x, *tensors, None, format, 416)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                for rows in (1, 2, 3, 4, 5, 7, 8):
                    assert torch.equal(run(x[:rows], *tensors, None, format, 416), few[:rows]), (name, count, rows)
                for rows in (9, 16, 17, 32, 33, 549):
                    assert torch.equal(run(x[:rows], *tensors, None, format, 416), many[:rows]), (name, count, rows)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("rows", [1, 24])
@pytest.mark.parametrize("format", ["int4:32:fp32", "nf4:64:fp32", "fp8_e4m3:row", "mxfp4", "mxfp8_e4m3", "nvfp4"])
def test_fp32_inputs_are_multiplied_at_fp32_grade(format: str, rows: int) -> None:
    """Law 6: at most twice torch's own error, both against fp64."""
    tensors = stored(format, 256, 1024)
    x = inputs(rows, 1024)
    expected = exact(x, tensors, format, 1024)
    weight = decoded(tensors, format, 1024).float()
    ours = (linear_coded(x, *tensors, None, format, 1024).double() - expected).norm()
    theirs = (torch.nn.functional.linear(x, weight).double() - expected).norm()
    assert ours <= 2 * theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", ["int4:32:fp32", "nf4:64:fp32"])
def test_half_inputs_lose_no_more_than_torch_does(format: str, dtype: torch.dtype) -> None:
    """Law 6: at most twice torch's own error on the decoded weights in x's dtype, both against fp64."""
    tensors = stored(format, 256, 1024)
    x = inputs(24, 1024, dtype=dtype)
    expected = exact(x, tensors, format, 1024)
    weight = decoded(tensors, format, 1024).to(dtype)
    ours = (linear_coded(x, *tensors, None, format, 1024).double() - expected).norm()
    theirs = (torch.nn.functional.linear(x, weight).double() - expected).norm()
    assert ours <= 2 * theirs


def test_one_large_input_does_not_swamp_the_other_blocks() -> None:
    tensors = stored("int4:32:fp32", 16, 512)
    x = inputs(2, 512, dtype=torch.bfloat16)
    x[:, 3] = 1e4
    y = linear_coded(x.float(), *tensors, None, "int4:32:fp32", 512)
    assert_within(y, x.float(), tensors, "int4:32:fp32", 512)
    x[:, 3] = 0
    calm = linear_coded(x, *tensors, None, "int4:32:fp32", 512)
    assert ((calm.double() - exact(x, tensors, "int4:32:fp32", 512)).abs().max()) < 2.0**-7


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("format", ["int4:32", "mxfp4"])
def test_in_integers_a_row_that_is_not_finite_becomes_nan_and_harms_no_other(
    format: str, bad: float, dtype: torch.dtype
) -> None:
    tensors = stored(format, 20, 96)
    x = inputs(3, 96, dtype=dtype)
    clean = linear_coded(x, *tensors, None, format, 96)
    x[1, 40] = bad
    for name, integers, run in compiled(format):
        y = run(x, *tensors, None, format, 96)
        assert y[1].isnan().all() if integers else not y[1].isfinite().any(), name
        if integers:
            assert torch.equal(y[[0, 2]], clean[[0, 2]]), name


@pytest.mark.parametrize("rows", [1, 2, 5, 20])
@pytest.mark.parametrize(
    ("format", "code", "value"),
    [
        ("fp8_e4m3:row", 0x7F, "nan"),
        ("fp8_e4m3:row", 0xFF, "nan"),
        ("fp8_e5m2:row", 0x7C, "inf"),
        ("fp8_e5m2:row", 0xFC, "-inf"),
        ("fp8_e5m2:row", 0x7E, "nan"),
    ],
)
def test_codes_that_are_no_numbers(format: str, code: int, value: str, rows: int) -> None:
    codes, *scales = stored(format, 21, 96)
    codes[4, 70] = code
    x = inputs(rows, 96).abs() + 0.1
    for name, run in laid_out(format, 21, 96, (codes, *scales)):
        y = run(x)
        assert torch.equal(y[:, 4].nan_to_num(nan=7.0), torch.full((rows,), float(value)).nan_to_num(nan=7.0)), name
        assert y[:, :4].isfinite().all(), name
        assert y[:, 5:].isfinite().all(), name


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize(("format", "nan"), [("mxfp4", 255), ("mxfp8_e4m3", 255), ("nvfp4", 127)])
def test_a_scale_that_is_no_number(format: str, nan: int, rows: int) -> None:
    codes, scale, zero, factor = stored(format, 21, 96)
    assert scale is not None
    scale[4, 1] = nan
    for name, run in laid_out(format, 21, 96, (codes, scale, zero, factor)):
        y = run(inputs(rows, 96))
        assert y[:, 4].isnan().all(), name
        assert y[:, :4].isfinite().all(), name
        assert y[:, 5:].isfinite().all(), name


@pytest.mark.parametrize("rows", [1, 20])
def test_the_least_and_the_greatest_scales_of_mx(rows: int) -> None:
    """2^-127 is subnormal as fp32, and 2^127 times 1.5 its greatest power of two but one."""
    for format in ("mxfp4", "mxfp6_e2m3", "mxfp8_e4m3", "mxfp8_e5m2"):
        values = torch.from_numpy(storage(format).values)
        one = int((values == 1.5).nonzero()[0])
        codes = formats.parse(format).tensors((3, 32))["codes"]
        bits = formats.parse(format).bits
        row = sum(one << bits * i for i in range(32)).to_bytes(32 * bits // 8, "little")
        stored_codes = torch.tensor(list(row) * 3, dtype=torch.uint8).reshape(codes.shape)
        x = torch.zeros(rows, 32)
        for code, factor in ((0, 2.0**-127), (254, 2.0**127)):
            x[:, 5] = 1.0
            scale = torch.full((3, 1), code, dtype=torch.uint8)
            for name, run in laid_out(format, 3, 32, (stored_codes, scale, None, None)):
                y = run(x)
                assert torch.equal(y, torch.full((rows, 3), 1.5 * factor)), (format, name)


@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("format", ["int8:64:fp32", "fp8_e4m3:row", "nf4:64:fp32"])
def test_the_ends_of_the_range(format: str, magnitude: float) -> None:
    tensors = stored(format, 9, 64)
    for rows in (2, 12):
        x = inputs(rows, 64) * magnitude
        y = linear_coded(x, *tensors, None, format, 64)
        torch.testing.assert_close(y.double(), exact(x, tensors, format, 64), rtol=1e-5, atol=1e-6 * magnitude)


def test_the_largest_sums_do_not_overflow() -> None:
    """All codes 255 over zero 0, all words at their largest: 255 * 32639 * 128 is below 2^31."""
    codes = torch.full((17, 256), 255, dtype=torch.uint8)
    scale, zero = torch.full((17, 2), 2.0**-8), torch.zeros(17, 2, dtype=torch.uint8)
    format = "int8:128:asym:fp32"
    for value in (1.984375, 1.9765625, 1.0, -1.984375):
        x = torch.full((18, 256), value, dtype=torch.bfloat16)
        for name, _, run in compiled(format):
            y = run(x.float(), codes, scale, zero, None, None, format, 256)
            assert torch.equal(y, torch.full_like(y, value * 255)), name
            assert torch.equal(run(x, codes, scale, zero, None, None, format, 256), y.bfloat16()), name


@pytest.mark.parametrize("format", ["int4:32", "nf4:32", "mxfp6_e3m2"])
def test_shapes_strides_and_offsets(format: str) -> None:
    """Leading dimensions, no rows, strided inputs, and tensors that lie at odd addresses."""
    codes, scale, zero, factor = stored(format, 21, 96)
    x = inputs(2, 3, 96, dtype=torch.bfloat16)
    rest = (scale, zero, factor, None, format, 96)
    expected = linear_coded(x.reshape(6, 96), codes, *rest)
    assert torch.equal(linear_coded(x, codes, *rest), expected.reshape(2, 3, 21))
    assert linear_coded(x[:0], codes, *rest).shape == (0, 3, 21)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(linear_coded(strided, codes, *rest), expected.reshape(2, 3, 21))
    assert torch.equal(linear_coded(x[0, 0], codes, *rest), expected[0])
    raw = torch.empty(codes.numel() + 1, dtype=torch.uint8)
    odd = raw[1:].view(codes.shape)
    odd.copy_(codes)
    assert odd.data_ptr() % 2 == 1
    assert torch.equal(linear_coded(x, odd, *rest), expected.reshape(2, 3, 21))


def test_one_scale_for_the_whole_matrix() -> None:
    codes, _, _, _ = stored("int8:tensor", 21, 96)
    one = torch.tensor([[0.01]])
    x = inputs(5, 96)
    y = linear_coded(x, codes, one, None, None, None, "int8:tensor", 96)
    every = one.expand(21, 1).contiguous()
    assert torch.equal(y, linear_coded(x, codes, every, None, None, None, "int8:row:fp32", 96))


@pytest.mark.parametrize("format", ["int4:32:asym", "fp8_e4m3:128x128", "nvfp4", "int8:column", "ternary5:32x32"])
def test_gradients(format: str) -> None:
    tensors = stored(format, 11, 64)
    x = inputs(5, 64).requires_grad_()
    bias = inputs(11).requires_grad_()
    grad = inputs(5, 11, seed=4)
    linear_coded(x, *tensors, bias, format, 64).backward(grad)
    torch.testing.assert_close(x.grad, (grad.double() @ decoded(tensors, format, 64)).float())
    torch.testing.assert_close(bias.grad, grad.sum(0))


@pytest.mark.parametrize("format", ["int4:32", "mxfp8_e4m3", "nvfp4", "ternary5"])
def test_compiles_without_a_graph_break(format: str) -> None:
    tensors = stored(format, 11, 64)
    x = inputs(5, 64).requires_grad_()

    def layer(x: Tensor) -> Tensor:
        return torch.relu(linear_coded(x, *tensors, None, format, 64)).sum()

    compiled_layer = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled_layer(x).backward()
    expected = x.grad
    x.grad = None
    layer(x).backward()
    assert torch.equal(x.grad, expected)


def test_other_devices_take_the_reference() -> None:
    tensors = [None if t is None else t.to("meta") for t in stored("int4:32", 11, 64)]
    y = linear_coded(torch.empty(5, 64, device="meta", dtype=torch.bfloat16), *tensors, None, "int4:32", 64)
    assert (y.shape, y.dtype) == ((5, 11), torch.bfloat16)


PANELS = torch.zeros(2, 12, 64, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 95)}, ValueError, "x has the shape"),
        ({"x": torch.zeros(2, 96, dtype=torch.float64)}, TypeError, "x is torch.float64"),
        ({"codes": torch.zeros(21, 47, dtype=torch.uint8)}, ValueError, "codes has the shape"),
        ({"codes": torch.zeros(21, dtype=torch.uint8)}, ValueError, "codes has the shape"),
        ({"codes": torch.zeros(21, 48, dtype=torch.int8)}, TypeError, "codes is torch.int8"),
        ({"scale": torch.zeros(21, 4, dtype=torch.bfloat16)}, ValueError, "scale has the shape"),
        ({"scale": None}, ValueError, "scale is missing"),
        ({"scale": torch.zeros(21, 3, dtype=torch.int32)}, TypeError, "scale is torch.int32"),
        ({"zero": torch.zeros(21, 3, dtype=torch.uint8)}, ValueError, "zero is given"),
        ({"global_scale": torch.ones(1)}, ValueError, "global_scale is given"),
        ({"bias": torch.zeros(20)}, ValueError, "bias has the shape"),
        ({"format": "int9:32"}, ValueError, "int9:32"),
        ({"format": "bf16"}, ValueError, "linear_dense"),
        ({"outputs": 22}, ValueError, "codes has the shape"),
        ({"outputs": -1}, ValueError, "outputs=-1"),
        ({"codes": torch.zeros(2, 12, 64, dtype=torch.uint8)}, ValueError, "outputs=0; packed codes"),
        ({"codes": torch.zeros(2, 12, 64, dtype=torch.uint8), "outputs": 21}, ValueError, "scale has the shape"),
        (
            {"codes": torch.zeros(2, 21, 64, dtype=torch.uint8), "outputs": 21, "format": "int7:32"},
            ValueError,
            "packed",
        ),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    codes, scale, _, _ = stored("int4:32", 21, 96)
    arguments = {
        "x": torch.zeros(2, 96),
        "codes": codes,
        "scale": scale,
        "zero": None,
        "global_scale": None,
        "bias": None,
        "format": "int4:32",
    }
    with pytest.raises(error, match=message):
        linear_coded(**(arguments | change), columns=96)


class TestLinearCoded(KernelLaws):
    operation = "linear_coded"

    @pytest.fixture(
        params=[
            (1, "int4:32", torch.bfloat16),
            (17, "int8:row", torch.float32),
            (3, "int3:32:asym", torch.float16),
            (5, "mxfp8_e4m3", torch.float32),
            (2, "nvfp4", torch.bfloat16),
            (4, "fp8_e4m3:48", torch.float32),
            (2, "int4:32", torch.bfloat16, "packed"),
            (6, "nvfp4:16x16", torch.float32, "packed"),
            (1, "int5:32:asym", torch.float16, "packed"),
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
        x, *tensors, _, format, columns, outputs = call
        if outputs:
            tensors = unpacked(tensors, format, (outputs, columns))
        bound = product_bound(x.detach(), tuple(tensors), format, columns) * 2
        slack = torch.finfo(x.dtype).eps * expected.detach().double().abs() + 2.0**-22
        assert ((found.double() - expected.double()).abs() <= bound + slack).all(), name


def test_a_group_beyond_the_row_is_the_row() -> None:
    tensors = stored("int4:128", 5, 48)
    x = inputs(3, 48).requires_grad_()
    y, again = (linear_coded(x, *tensors, None, format, 48) for format in ("int4:128", "int4:64"))
    assert torch.equal(y, again)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(again.sum(), x)[0])


def test_the_gradient_expands_a_part_of_the_matrix_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for format in ("int4:48", "fp8_e4m3:16x16", "nvfp4:16x16"):
        tensors = stored(format, 37, 48)
        x, grad = inputs(3, 48).requires_grad_(), inputs(3, 37, seed=9)
        whole = torch.autograd.grad(linear_coded(x, *tensors, None, format, 48), x, grad)[0]
        monkeypatch.setattr(gradient, "EXPANDED", 48 * 5)
        parts = torch.autograd.grad(linear_coded(x, *tensors, None, format, 48), x, grad)[0]
        torch.testing.assert_close(parts, whole)
        if storage(format).packs((37, 48)):
            panels = packed(tensors, format, (37, 48))
            of_panels = torch.autograd.grad(linear_coded(x, *panels, None, format, 48, 37), x, grad)[0]
            torch.testing.assert_close(of_panels, whole)
        monkeypatch.undo()


def test_no_rows_cost_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Tensor:
        raise AssertionError("the matrix was decoded")

    monkeypatch.setattr("parco.kernels.linear.reference.dense", refuse)
    tensors = stored("mxfp4", 21, 96)
    assert linear_coded(torch.empty(2, 0, 96), *tensors, None, "mxfp4", 96).shape == (2, 0, 21)


def test_there_is_no_forward_derivative_and_that_is_said() -> None:
    tensors = stored("int4:48", 5, 48)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda x: linear_coded(x, *tensors, None, "int4:48", 48), (inputs(3, 48),), (inputs(3, 48),))


def test_every_named_format_has_a_compiled_kernel() -> None:
    for name in formats.NAMES:
        if not formats.parse(name).is_dense:
            assert any(True for _ in compiled(name)), name


# A row does not fill AMX's tiles.
@pytest.mark.parametrize("isa", [isa for isa in machine.ISAS if isa not in ("generic", "amx")])
def test_vectors_serve_every_named_format_below_16_bits(isa: str) -> None:
    """What an instruction set leaves to plain C++ is slow; only int and fp4 columns may be."""
    for name in formats.NAMES:
        if formats.parse(name).is_dense:
            continue
        call = coded.CodedCall("cpu", isa, torch.bfloat16, 1, 64, 256, name)
        assert table.choose("linear_coded", call).isa == isa, name
