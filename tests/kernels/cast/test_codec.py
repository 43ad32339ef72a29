import pytest
import torch

from parco import formats
from parco.kernels.cast import decode, decode_tensors, encode, random_bits, unpack


def test_int4_by_hand():
    x = torch.tensor([[7.0, -8.0, 0.4, 1.6] + [0.0] * 28 + [3.5, -3.5]])
    encoded = encode(x, "int4:32")
    # amax / 7: 8 / 7 rounded to bf16, then 0.5 in the short last group.
    scale = torch.tensor([[8 / 7, 0.5]]).to(torch.bfloat16)
    assert torch.equal(encoded.tensors["scale"], scale)
    codes = unpack(encoded.tensors["codes"], 4, 34)[0]
    assert codes[:4].tolist() == [8 + 6, 8 - 7, 8, 8 + 1]
    assert codes[32:].tolist() == [8 + 7, 8 - 7]
    assert torch.equal(decode(encoded)[0, :2], torch.tensor([6.0, -7.0]) * scale[0, 0].float())


def test_codes_come_from_the_rounded_scale():
    x = torch.full((1, 32), 1.0)
    x[0, 0] = 7 * 1.0039  # amax / 7 is no bf16 number
    encoded = encode(x, "int4:32")
    scale = encoded.tensors["scale"].float()
    assert torch.equal(decode(encoded), torch.round(x / scale).clamp(-8, 7) * scale)


def test_asymmetric_by_hand():
    x = torch.cat([torch.linspace(-1, 14, 31), torch.tensor([0.0])]).reshape(1, 32)
    encoded = encode(x, "int4:32:asym:fp32")
    assert encoded.tensors["scale"].item() == pytest.approx(1.0)
    assert encoded.tensors["zero"].item() == 1
    codes = unpack(encoded.tensors["codes"], 4, 32)[0]
    assert (codes.min(), codes.max()) == (0, 15)
    assert (decode(encoded) - x).abs().max() <= 0.5
    positive = encode(x.abs() + 3, "int4:32:asym")
    assert positive.tensors["zero"].item() == 0


def test_ternary_is_bitnets():
    w = torch.randn(20, 50)
    mean = w.abs().mean().clamp(min=1e-5)
    expected = torch.round(w / mean).clamp(-1, 1) * mean
    torch.testing.assert_close(decode(encode(w, "ternary")), expected)
    assert decode(encode(w, "ternary")).unique().numel() == 3


def test_nf4_is_qloras_table():
    w = torch.randn(4, 64)
    encoded = encode(w, "nf4:64:fp32")
    torch.testing.assert_close(encoded.tensors["scale"], w.abs().amax(1, keepdim=True))
    table = torch.tensor(formats.NF4.entries)
    nearest = ((w / w.abs().amax(1, keepdim=True))[..., None] - table).abs().argmin(-1)
    assert torch.equal(unpack(encoded.tensors["codes"], 4, 64).long(), nearest)


@pytest.mark.parametrize("name", ["fp8_e4m3:row", "fp8_e4m3:128x128", "fp8_e5m2:1x128"])
def test_fp8_scales_map_the_greatest_to_the_greatest(name):
    w = torch.randn(256, 256)
    encoded = encode(w, name)
    element = encoded.format.element
    back = decode(encoded)
    largest = w.abs().argmax()
    torch.testing.assert_close(back.flatten()[largest], w.flatten()[largest])
    scale = encoded.tensors["scale"]
    blocks = w.reshape(scale.shape[0], 256 // scale.shape[0], scale.shape[1], 256 // scale.shape[1])
    torch.testing.assert_close(scale, blocks.abs().amax((1, 3)) / element.max)


def test_power_of_two_scales():
    w = torch.randn(128, 256)
    scale = encode(w, "fp8_e4m3:128x128:pow2").tensors["scale"]
    plain = encode(w, "fp8_e4m3:128x128").tensors["scale"]
    assert (torch.frexp(scale).mantissa == 0.5).all()
    assert (scale >= plain).all()
    assert (scale < 2 * plain).all()
    exact = torch.full((1, 128), 448.0 * 2.0**-9)
    assert encode(exact, "fp8_e4m3:1x128:pow2").tensors["scale"].item() == 2.0**-9


def test_scales_saturate_in_fp16():
    encoded = encode(torch.full((1, 32), 1e9), "int4:32:fp16")
    assert encoded.tensors["scale"].item() == 65504
    assert torch.equal(decode(encoded), torch.full((1, 32), 7 * 65504.0))


def test_given_scales_are_kept():
    x = torch.randn(3, 64)
    scale = torch.full((3, 2), 0.25, dtype=torch.bfloat16)
    encoded = encode(x, "int4:32", scale=scale)
    assert torch.equal(encoded.tensors["scale"], scale)
    assert torch.equal(decode(encoded), torch.round(x / 0.25).clamp(-8, 7) * 0.25)
    zero = torch.full((3, 2), 3, dtype=torch.uint8)
    shifted = encode(x, "int4:32:asym", scale=scale, zero=zero)
    assert torch.equal(decode(shifted), (torch.round(x / 0.25) + 3).clamp(0, 15).sub(3) * 0.25)
    x[1, 5] = torch.nan
    assert torch.isnan(encode(x, "int4:32", scale=scale).tensors["scale"]).nonzero().tolist() == [[1, 0]]


def test_stochastic_bf16_adds_sixteen_random_bits():
    """The usual recipe: add 16 uniform bits to the fp32 pattern, then clear its low 16."""
    x = torch.randn(33, 70) * torch.exp2(torch.arange(33) * 7.5 - 140)[:, None]  # subnormals too
    bits = x.view(torch.int32) + (random_bits(11, range(33), 70) & 0xFFFF).to(torch.int32)
    expected = (bits & ~0xFFFF).view(torch.float32)
    drawn = encode(x, "bf16", rounding="stochastic", seed=11).tensors["values"]
    assert torch.equal(drawn.float(), expected)


@pytest.mark.parametrize(("name", "least"), [("fp16", -24), ("fp8_e4m3", -9), ("fp8_e5m2", -16), ("fp6_e3m2", -4)])
def test_stochastic_rounding_is_unbiased_between_subnormals(name, least):
    fractions = torch.tensor([0.003, 0.1, 0.25, 0.5, 0.9, 1.3, -0.7, -1.6, 2.5])
    x = (fractions * 2.0**least).repeat(40_000, 1)
    mean = decode(encode(x, name, rounding="stochastic", seed=2)).double().mean(0) / 2.0**least
    # 40,000 draws: the standard deviation of the mean is at most 0.0025 spacings; six of them.
    assert ((mean - fractions).abs() < 0.015).all()


def test_stochastic_rounding_follows_the_seed():
    x = torch.randn(16, 64)
    draw = [encode(x, "mxfp4", rounding="stochastic", seed=seed).tensors["codes"] for seed in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


def test_encoded_prints_itself():
    encoded = encode(torch.zeros(2, 3, 64), "int4:32")
    assert str(encoded) == "Encoded(int4:32, 2x3x64, 216 bytes)"
    assert encoded.nbytes == 216


def test_gradients_do_not_flow():
    x = torch.randn(2, 32, requires_grad=True)
    assert not decode(encode(x, "int4:32")).requires_grad


def test_decode_compiles():
    x = torch.randn(8, 64)
    for name in ("int4:32:asym", "mxfp4", "nvfp4", "nf4:64"):
        encoded = encode(x, name)
        compiled = torch.compile(lambda tensors, name=name: decode_tensors(name, (8, 64), tensors), backend="eager")
        assert torch.equal(compiled(encoded.tensors), decode(encoded))


def test_refusals():
    x = torch.randn(3, 64)
    scale = torch.ones(3, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"unknown format 'int9:32'.*Known: fp32"):
        encode(x, "int9:32")
    with pytest.raises(ValueError, match="rounding='up': must be one of nearest, zero, stochastic"):
        encode(x, "int4:32", rounding="up")
    with pytest.raises(TypeError, match=r"x.dtype=torch.int64"):
        encode(x.long(), "int4:32")
    with pytest.raises(ValueError, match="without dimensions"):
        encode(torch.tensor(1.0), "int4:32")
    with pytest.raises(
        ValueError, match=r"scale is torch.float32 \(3, 2\), but format int4:32 .* needs torch.bfloat16"
    ):
        encode(x, "int4:32", scale=scale.float())
    with pytest.raises(ValueError, match=r"scale is .* \(2, 3\).* needs .* \(3, 2\)"):
        encode(x, "int4:32", scale=scale.t())
    with pytest.raises(ValueError, match="zero= given, but format int4:32 has scale"):
        encode(x, "int4:32", scale=scale, zero=torch.zeros(3, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="scale= given, but format bf16 has no scales"):
        encode(x, "bf16", scale=scale)
    with pytest.raises(ValueError, match="is asymmetric: pass zero="):
        encode(x, "int4:32:asym", scale=scale)
    with pytest.raises(ValueError, match="zero= given without scale="):
        encode(x, "int4:32:asym", zero=torch.zeros(3, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="delayed scale comes from earlier steps"):
        encode(x, "fp8_e4m3:tensor:delayed")
    with pytest.raises(ValueError, match="seed=-1"):
        encode(x, "mxfp4", rounding="stochastic", seed=-1)
