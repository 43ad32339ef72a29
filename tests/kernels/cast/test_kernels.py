"""cast_codes and row_amax: the bits of the reference, from every instruction set and any number of threads."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.laws.kernel_laws import KernelLaws
from torch import Tensor

from parco import formats, machine
from parco.kernels import table
from parco.kernels.cast import ROUNDINGS, decode, encode
from parco.kernels.cast.amax import row_amax
from parco.kernels.cast.codes import cast_codes
from parco.kernels.cast.decoding import decode_codes
from parco.kernels.cast.rows import cast_rows
from parco.kernels.cast.scaling import rule
from parco.weights import Quantized

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALED = [name for name in formats.NAMES if not formats.parse(name).is_dense]


def sample(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of many sizes, with zeros, subnormals, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(rows * columns)
    x = torch.randn(rows, columns, generator=generator) * torch.exp(3 * torch.randn(rows, columns, generator=generator))
    special = [
        0.0,
        -0.0,
        1e-42,
        -1e-45,
        float("inf"),
        float("-inf"),
        float("nan"),
        -float("nan"),
        3e38,
        -6e-8,
        448.0,
        0.5,
    ]
    for i, value in enumerate(special[: columns - 1]):
        x[i % rows, (7 * i + 3) % columns] = value
    return x.to(dtype)


def compiled(operation: str) -> Iterator[table.Kernel]:
    for kernel in table.operations()[operation].kernels[:-1]:
        if kernel.isa in machine.detect().isas:
            yield kernel


def scales_of(x: Tensor, name: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The scales that the format gives to the finite numbers of x, a NaN among them where there are two."""
    given = {}
    if isinstance(formats.parse(name).scale, formats.ScaleDelayed):
        given = {"scale": torch.tensor([[0.37]])}
    tensors = encode(torch.nan_to_num(x.float(), 0.0, 5.0, -5.0), name, **given).tensors
    scale = tensors.get("scale")
    if scale is not None and scale.numel() > 1:
        scale[-1, -1] = {torch.uint8: 255}.get(scale.dtype, float("nan"))
        scale[0, 0] = 0
    return scale, tensors.get("zero"), tensors.get("global_scale")


@pytest.mark.parametrize("name", SCALED)
def test_every_kernel_writes_the_codes_of_the_reference(name: str) -> None:
    reference = table.operations()["cast_codes"].kernels[-1].run
    for rows, columns in ((5, 300), (33, 64), (1, 17), (3, 1), (7, 96), (40, 513)):
        for dtype in DTYPES:
            x = sample(rows, columns, dtype)
            scales = scales_of(x, name)
            for rounding in ROUNDINGS:
                for seed in (3, 2**64 - 1):
                    wanted = reference(x, *scales, name, rounding, seed)
                    for kernel in compiled("cast_codes"):
                        found = kernel.run(x, *scales, name, rounding, seed)
                        assert torch.equal(found, wanted), (kernel.name, rows, columns, dtype, rounding)
                if rounding != "stochastic":
                    assert torch.equal(cast_codes(x, *scales, name, rounding, 0), wanted)


ROWS = [name for name in SCALED if rule(formats.parse(name)) is not None]


@pytest.mark.parametrize(
    "name", [*ROWS, "mxfp8_e5m2:floor", "mxfp6_e2m3:even", "mxfp8_e4m3:ceil", "int4:32:fp16", "int8:16:fp32"]
)
def test_every_kernel_finds_the_scales_of_the_reference(name: str) -> None:
    reference = table.operations()["cast_rows"].kernels[-1].run
    for rows, columns in ((5, 300), (33, 64), (1, 17), (3, 1), (0, 40), (7, 96), (3, 2200), (40, 513)):
        for dtype in DTYPES:
            x = sample(rows, columns, dtype) if rows else torch.zeros(0, columns, dtype=dtype)
            if rows > 2:
                x[2] = 0
                x[1] *= 1e-30
            if rows:  # the sign of a NaN under a scale that is NaN is nobody's: one, positive
                x = torch.nan_to_num(x, nan=0.0, posinf=float("inf"), neginf=-float("inf"))
                x[0, columns // 2] = float("nan")
            factor = torch.tensor([0.0017]) if name == "nvfp4" else None
            for rounding in ("nearest", "stochastic"):
                wanted = reference(x, factor, name, rounding, 11)
                for kernel in compiled("cast_rows"):
                    codes, scale = kernel.run(x, factor, name, rounding, 11)
                    assert torch.equal(codes, wanted[0]), (kernel.name, rows, columns, dtype)
                    torch.testing.assert_close(scale, wanted[1], rtol=0, atol=0, equal_nan=True)


def test_the_largest_and_least_magnitudes_have_the_scales_of_the_reference() -> None:
    """Every exponent that fp32 has, at its ends, as the greatest magnitude of a block."""
    reference = table.operations()["cast_rows"].kernels[-1].run
    bits = torch.arange(0, 255, dtype=torch.int32)[:, None] << 23
    ends = torch.cat([bits, bits + 1, bits + 0x3FFFFF, bits + 0x400000, bits + 0x600000, bits + 0x7FFFFF], 1)
    x = torch.zeros(255 * 6, 32)
    x[:, 7] = ends.reshape(-1).view(torch.float32)
    for name in ROWS:
        factor = torch.tensor([2.0**-117]) if name == "nvfp4" else None
        wanted = reference(x, factor, name, "nearest", 0)
        for kernel in compiled("cast_rows"):
            for found, expected in zip(kernel.run(x, factor, name, "nearest", 0), wanted, strict=True):
                assert torch.equal(found, expected), (name, kernel.name)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1", "int8:tensor", "nf4:64"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_all_numbers_of_16_bits(name: str, rounding: Any) -> None:
    reference = table.operations()["cast_codes"].kernels[-1].run
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).reshape(256, 256)
        scales = scales_of(torch.ones(256, 256), name)
        for kernel in compiled("cast_codes"):
            assert torch.equal(kernel.run(x, *scales, name, rounding, 5), reference(x, *scales, name, rounding, 5)), (
                kernel.name
            )


def test_threads_and_strides_do_not_change_the_codes() -> None:
    x = sample(700, 520)
    scales = scales_of(x, "mxfp8_e4m3")
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(cast_codes(x, *scales, "mxfp8_e4m3", "stochastic", 9))
            found.append(cast_codes(x.T.contiguous().T, *scales, "mxfp8_e4m3", "stochastic", 9))
            assert torch.equal(row_amax(x, 32).nan_to_num(), row_amax(x.T.contiguous().T, 32).nan_to_num())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(codes, found[0]) for codes in found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_amax_is_the_references(dtype: torch.dtype) -> None:
    reference = table.operations()["row_amax"].kernels[-1].run
    for rows, columns in ((5, 300), (33, 64), (1, 17), (3, 1), (0, 5), (9, 4096)):
        x = sample(rows, columns, dtype) if rows else torch.zeros(0, columns, dtype=dtype)
        for group in (1, 16, 32, 48, 128, 1 << 40):
            wanted = reference(x, group)
            assert wanted.isnan().any() == x.isnan().any()
            for kernel in compiled("row_amax"):
                torch.testing.assert_close(kernel.run(x, group), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [*SCALED, "int8:column:asym", "int5:48:asym"])
def test_every_kernel_decodes_as_the_reference(name: str) -> None:
    """All bytes as codes and scales: NaN, infinities and scales that no encoding gives among them."""
    reference = table.operations()["decode_codes"].kernels[-1].run
    generator = torch.Generator().manual_seed(5)
    for rows, columns in ((5, 300), (33, 64), (1, 17), (3, 1), (0, 40), (40, 517)):
        tensors = {}
        for tensor, spec in formats.parse(name).tensors((rows, columns)).items():
            raw = torch.randint(0, 256, (*spec.shape, spec.dtype.itemsize), generator=generator, dtype=torch.uint8)
            tensors[tensor] = raw.view(spec.dtype)[..., 0]
            if tensor != "codes" and spec.dtype != torch.uint8:
                tensors[tensor] = torch.randn(spec.shape, generator=generator).to(spec.dtype)
        given = [tensors.get(part) for part in ("codes", "scale", "zero", "global_scale")]
        for dtype in DTYPES:
            wanted = reference(*given, name, columns, dtype)
            for kernel in compiled("decode_codes"):
                found = kernel.run(*given, name, columns, dtype)
                torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
                assert torch.equal(torch.signbit(found)[~found.isnan()], torch.signbit(wanted)[~wanted.isnan()])


@pytest.mark.parametrize("name", ["nf4:64", "mxfp4", "int4:32"])
def test_the_default_dtype_has_no_say(name: str) -> None:
    x = sample(4, 128)
    wanted = encode(x, name).tensors["codes"]
    try:
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            assert torch.equal(encode(x, name).tensors["codes"], wanted)
    finally:
        torch.set_default_dtype(torch.float32)


def test_neither_has_a_mode_that_flushes_subnormals() -> None:
    x = torch.full((4096, 64), 3e-5, dtype=torch.float16)
    wanted = cast_codes(x, None, None, None, "fp8_e5m2", "nearest", 0)
    try:
        torch.set_flush_denormal(True)
        for kernel in compiled("cast_codes"):
            assert torch.equal(kernel.run(x, None, None, None, "fp8_e5m2", "nearest", 0), wanted), kernel.name
    finally:
        torch.set_flush_denormal(False)
    assert wanted.all()


def test_an_element_of_ones_own_is_encoded_by_its_own_entries() -> None:
    entries = tuple(i / 15 for i in range(16))
    own = formats.Format(formats.Table("nf4", 4, entries), formats.group(64), formats.ScaleAbsmax())
    assert not own.is_named
    x = torch.rand(3, 64)
    assert (decode(encode(x, own)) - x).abs().max() < 0.04
    five = formats.Format(formats.Float("fp5_e2m2", 2, 2, 1, "none"), formats.ROW, formats.ScaleAbsmax())
    assert (decode(encode(torch.linspace(-1, 1, 64)[None], five)) - torch.linspace(-1, 1, 64)).abs().max() < 0.2
    with pytest.raises(ValueError, match="no name stands for"):
        Quantized(own, (3, 64))


def test_wrong_arguments_are_named() -> None:
    x, scale = torch.zeros(4, 64), torch.zeros(4, 2, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"x is torch\.int32"):
        cast_codes(x.int(), scale, None, None, "int4:32", "nearest", 0)
    with pytest.raises(ValueError, match="scale is None"):
        cast_codes(x, None, None, None, "int4:32", "nearest", 0)
    with pytest.raises(ValueError, match="zero is"):
        cast_codes(x, scale, torch.zeros(4, 2, dtype=torch.uint8), None, "int4:32", "nearest", 0)
    with pytest.raises(ValueError, match="dense"):
        cast_codes(x, None, None, None, "bf16", "nearest", 0)
    with pytest.raises(ValueError, match="rounding='up'"):
        cast_codes(x, scale, None, None, "int4:32", "up", 0)
    with pytest.raises(ValueError, match="seed=-1"):
        cast_codes(x, scale, None, None, "int4:32", "stochastic", -1)
    with pytest.raises(ValueError, match="not found row by row"):
        cast_rows(x, None, "fp8_e4m3:tensor", "nearest", 0)
    with pytest.raises(ValueError, match="global_scale is None"):
        cast_rows(x, None, "nvfp4", "nearest", 0)
    with pytest.raises(ValueError, match="global_scale is"):
        cast_rows(x, torch.ones(1), "mxfp4", "nearest", 0)
    with pytest.raises(TypeError, match="matrix of floats"):
        row_amax(torch.zeros(4), 2)
    with pytest.raises(ValueError, match="group=0"):
        row_amax(x, 0)


def test_wrong_arguments_of_decoding_are_named() -> None:
    codes, scale = torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="codes is"):
        decode_codes(codes, scale, None, None, "int4:32", 96, torch.float32)
    with pytest.raises(ValueError, match="scale is"):
        decode_codes(codes, scale.float(), None, None, "int4:32", 64, torch.float32)
    with pytest.raises(ValueError, match="global_scale is"):
        decode_codes(codes, scale, None, torch.ones(1), "int4:32", 64, torch.float32)
    with pytest.raises(ValueError, match="dense"):
        decode_codes(codes, None, None, None, "bf16", 64, torch.float32)
    with pytest.raises(ValueError, match="a matrix of bytes"):
        decode_codes(codes[0], None, None, None, "fp4_e2m1", 64, torch.float32)
    with pytest.raises(TypeError, match=r"dtype is torch\.int8"):
        decode_codes(codes, scale, None, None, "int4:32", 64, torch.int8)


class TestDecodeCodes(KernelLaws):
    operation = "decode_codes"

    @pytest.fixture(params=["mxfp6_e2m3", "int4:32:asym", "fp8_e4m3", "nvfp4:16x16"])
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        x = torch.randn(20, 96, generator=torch.Generator().manual_seed(1))
        tensors = encode(x, request.param).tensors
        scales = (tensors.get("scale"), tensors.get("zero"), tensors.get("global_scale"))
        return tensors["codes"], *scales, request.param, 96, torch.bfloat16


class TestCastCodes(KernelLaws):
    operation = "cast_codes"

    @pytest.fixture(params=["mxfp4", "int4:32:asym", "nf4:64", "nvfp4:16x16"])
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        x = torch.randn(20, 96, generator=torch.Generator().manual_seed(1))
        return x, *scales_of(x, request.param), request.param, "stochastic", 7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_greatest_amax_is_the_references(dtype: torch.dtype) -> None:
    reference = table.operations()["greatest_amax"].kernels[-1].run
    for rows, columns in ((5, 300), (33, 64), (1, 17), (3, 1), (0, 5), (700, 512)):
        x = sample(rows, columns, dtype) if rows else torch.zeros(0, columns, dtype=dtype)
        for group in (16, 48, 1 << 40):
            for numbers in (x, torch.nan_to_num(x.float(), 0.0, 5.0, -7.0).to(dtype)):
                wanted = reference(numbers, group)
                assert torch.isfinite(wanted).all()
                for kernel in compiled("greatest_amax"):
                    assert torch.equal(kernel.run(numbers, group), wanted), kernel.name


class TestGreatestAmax(KernelLaws):
    operation = "greatest_amax"

    @pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        return torch.randn(20, 96, generator=torch.Generator().manual_seed(1)).to(request.param), 16


class TestRowAmax(KernelLaws):
    operation = "row_amax"

    @pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        return torch.randn(20, 96, generator=torch.Generator().manual_seed(1)).to(request.param), 32


class TestCastRows(KernelLaws):
    operation = "cast_rows"

    @pytest.fixture(params=["mxfp8_e4m3", "int4:32", "nvfp4"])
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        x = torch.randn(20, 96, generator=torch.Generator().manual_seed(1))
        return x, torch.tensor([0.01]) if request.param == "nvfp4" else None, request.param, "nearest", 7
