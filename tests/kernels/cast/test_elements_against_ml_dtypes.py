"""Every element against ml_dtypes, the oracle: the number of each code, and the code of every bf16 and every fp16
number.
"""

import ml_dtypes
import numpy as np
import pytest
import torch

from parco import formats
from parco.formats import BF16, E2M1, E2M3, E3M2, E4M3, E5M2, E8M0, FP16
from parco.kernels.cast import encode, to_power_of_two, unpack
from parco.kernels.cast.rounding import from_codes, to_codes

ORACLES = {
    E4M3: ml_dtypes.float8_e4m3fn,
    E5M2: ml_dtypes.float8_e5m2,
    E3M2: ml_dtypes.float6_e3m2fn,
    E2M3: ml_dtypes.float6_e2m3fn,
    E2M1: ml_dtypes.float4_e2m1fn,
}
elements = pytest.mark.parametrize("element", ORACLES, ids=lambda element: element.name)


def every_number(dtype):
    """All 65,536 numbers of a 16-bit dtype, as fp32."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).to(torch.float32)


@elements
def test_properties(element):
    info = ml_dtypes.finfo(ORACLES[element])
    assert (element.bits, element.mantissa_bits, element.exponent_bits) == (info.bits, info.nmant, info.nexp)
    assert element.max == float(info.max)
    assert element.least_exponent == info.minexp
    assert 2.0 ** (element.least_exponent - element.mantissa_bits) == float(info.smallest_subnormal)


@elements
def test_every_code(element):
    codes = np.arange(1 << element.bits, dtype=np.uint8)
    expected = codes.view(ORACLES[element]).astype(np.float32)
    numbers = from_codes(torch.from_numpy(codes), element)
    np.testing.assert_array_equal(numbers.numpy(), expected)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(numbers.numpy())[number], np.signbit(expected)[number])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@elements
def test_every_number(element, dtype):
    x = every_number(dtype)
    clamped = x.clamp(-element.max, element.max).numpy()
    number = ~np.isnan(clamped)
    with np.errstate(invalid="ignore"):
        expected = clamped.astype(ORACLES[element]).view(np.uint8)
    codes = encode(x.to(dtype).reshape(256, 256), element.name).tensors["codes"]
    codes = unpack(codes, element.bits, 256).reshape(-1).numpy()
    np.testing.assert_array_equal(codes[number], expected[number])
    if element.nan_code is None:
        assert (codes[~number] == element.max_code).all()
    else:
        np.testing.assert_array_equal(codes[~number] & 0x7F, expected[~number] & 0x7F)


@pytest.mark.parametrize("element", [BF16, FP16], ids=lambda element: element.name)
def test_nearest_16_bits_equal_torch(element):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[element.name]
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=generator, dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    x = x[torch.isfinite(x) & (x.abs() <= element.max)]
    codes = to_codes(x, element, "nearest").to(torch.int16).view(dtype)
    assert torch.equal(codes, x.to(dtype))


def test_dense_formats_saturate_finite_numbers_only():
    x = torch.tensor([[1e6, -1e6, torch.inf, -torch.inf, torch.nan, 3.4e38]])
    half = encode(x, "fp16").tensors["values"][0]
    assert half[:4].tolist() == [65504, -65504, torch.inf, -torch.inf]
    assert torch.isnan(half[4])
    assert torch.isfinite(encode(x, "bf16").tensors["values"][0, 5])
    for rounding in ("zero", "stochastic"):
        back = encode(x, "bf16", rounding=rounding).tensors["values"][0]
        assert back[2:4].tolist() == [torch.inf, -torch.inf]
        assert torch.isnan(back[4])


def test_power_of_two_every_code():
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(from_codes(torch.from_numpy(codes), E8M0).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_power_of_two_every_number(dtype):
    x = every_number(dtype)
    # Clamped, as saturation is ours: ml_dtypes makes NaN of what is above 2**127.
    with np.errstate(invalid="ignore"):
        expected = x.clamp(max=2.0**127).numpy().astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    np.testing.assert_array_equal(to_power_of_two(x).numpy(), expected)


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers(bits):
    element = formats.integer(bits)
    x = torch.arange(-140, 141, dtype=torch.float32) / 2
    codes = to_codes(x, element, "nearest")
    expected = torch.round(x).clamp(element.least, element.greatest)
    assert torch.equal(from_codes(codes, element), expected)
    assert int(codes.max()) < 1 << bits
    assert (element.least, element.greatest) == (
        (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    )
