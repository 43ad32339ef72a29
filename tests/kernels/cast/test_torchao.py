"""MX and NVFP4 against torchao, bit for bit, on random and adversarial blocks; where they differ, and why, is tested
too.
"""

import pytest
import torch

from parco.formats import E2M1, E2M3, E3M2, E4M3, E5M2, SCALE_RULES, group
from parco.kernels.cast import decode, encode, unpack
from parco.kernels.cast.scaling import nvfp4_global_scale
from parco.kernels.cast.tiles import block_amax

mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
nvfp4_tensor = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
ScaleCalculationMode = pytest.importorskip("torchao.prototype.mx_formats.config").ScaleCalculationMode

NAMES = {"mxfp8_e4m3": E4M3, "mxfp8_e5m2": E5M2, "mxfp6_e2m3": E2M3, "mxfp6_e3m2": E3M2, "mxfp4": E2M1}
THEIRS = {
    "mxfp8_e4m3": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
    "mxfp6_e2m3": "fp6_e2m3",
    "mxfp6_e3m2": "fp6_e3m2",
    "mxfp4": torch.float4_e2m1fn_x2,
}


def random_blocks():
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(256, 128, generator=generator)
    return x * torch.exp2(torch.randint(-90, 90, (256, 1), generator=generator).to(torch.float32))


def adversarial_blocks(element, columns=32):
    """Blocks whose greatest number, or every number, is where a rule or a rounding turns."""
    exponents = torch.tensor([-100, -20, -3, -1, 0, 1, 2, 5, 40, 100], dtype=torch.float32)
    mantissas = torch.tensor([1, 1 + 2**-23, 1.25, 1.4375, 1.5, 1.5625, 1.625, 1.75, 1.8125, 1.875, 1.9375, 2 - 2**-23])
    edges = torch.cat([mantissas, mantissas * element.max, torch.tensor([element.max * (1 + 2**-22)])])
    amax = (edges[:, None] * torch.exp2(exponents)[None, :]).reshape(-1, 1)
    ramp = torch.cat([amax, amax * torch.linspace(-1, 1, columns - 1)], 1)
    halves = torch.arange(columns, dtype=torch.float32) * element.max / columns / 2  # on and between the grid's numbers
    ties = torch.cat([halves.expand(len(exponents), -1)[:, :-1], torch.full((len(exponents), 1), element.max)], 1)
    ties = ties * torch.exp2(exponents)[:, None]
    special = torch.zeros(6, columns)
    special[1] = -0.0
    special[2, 3] = torch.inf
    special[3, 4], special[3, 5] = -torch.inf, 3.0
    special[4] = torch.finfo(torch.float32).max
    special[5, 0] = 1e30  # one outlier among small numbers
    special[5, 1:] = 1e-30
    return torch.cat([ramp, ties, special])


def ours(x, name, rule):
    encoded = encode(x, name if rule == "rceil" else f"{name}:{rule}")
    return encoded, unpack(encoded.tensors["codes"], encoded.format.bits, x.shape[1])


def theirs(x, name, rule):
    scale, data = mx_tensor.to_mx(x, THEIRS[name], 32, ScaleCalculationMode[rule.upper()])
    data = data.view(torch.uint8)
    if name == "mxfp4":
        data = unpack(data, 4, x.shape[1])
    return scale.view(torch.uint8), data


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("name", NAMES)
def test_mx(name, rule):
    for x in (random_blocks(), adversarial_blocks(NAMES[name])):
        encoded, codes = ours(x, name, rule)
        their_scale, their_codes = theirs(x, name, rule)
        scale = encoded.tensors["scale"]
        same = torch.ones_like(scale, dtype=torch.bool)
        if rule == "rceil":
            # torchao takes ceil(log2(amax / max)) with a rounded log2; the rule looks at the mantissa.
            descale = block_amax(x, group(32)) / NAMES[name].max
            mantissa = torch.frexp(descale).mantissa
            same = ~((mantissa > 0.5) & (mantissa < 0.5 + 2.0**-16))
            assert (scale[~same] - their_scale[~same].to(torch.int32) <= 1).all()
        assert torch.equal(scale[same], their_scale[same])
        agree = (scale == their_scale) & (scale > 0)
        per_element = agree.repeat_interleave(32, 1)
        assert torch.equal(codes[per_element], their_codes[per_element])
        assert agree.float().mean() > 0.9


@pytest.mark.parametrize("name", NAMES)
def test_mx_nan_poisons_its_block(name):
    x = torch.randn(4, 128)
    x[1, 40] = torch.nan
    for rule in SCALE_RULES:
        encoded, _ = ours(x, name, rule)
        their_scale, _ = theirs(x, name, rule)
        assert torch.equal(encoded.tensors["scale"], their_scale)
        assert torch.equal(torch.isnan(decode(encoded)).nonzero()[:, 0].unique(), torch.tensor([1]))
        assert torch.isnan(decode(encoded)[1, 32:64]).all()


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_mx_of_the_least_scale_is_divided_by_it(rule):
    """torchao divides such blocks by 2**-126 (1 under rceil) and multiplies by 2**-127: up to all of the block is
    lost.
    """
    x = torch.linspace(-1, 1, 32).reshape(1, 32) * 3 * 2.0**-127
    encoded, _ = ours(x, "mxfp4", rule)
    assert encoded.tensors["scale"].item() == 0
    error = (decode(encoded) - x).abs().max()
    assert error <= 2.0**-127 * 0.5  # half of the spacing between 2 and 3
    scale, data = mx_tensor.to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode[rule.upper()])
    back = mx_tensor.to_dtype(data, scale, torch.float4_e2m1fn_x2, 32, torch.float32)
    assert (back - x).abs().max() > 2 * error


def nvfp4_blocks():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(128, 64, generator=generator) * torch.exp(torch.randn(128, 1, generator=generator))
    adversarial = adversarial_blocks(E2M1, 64)
    adversarial = adversarial[torch.isfinite(adversarial).all(1) & (adversarial.abs().amax(1) < 1e20)]
    return x, x.to(torch.bfloat16).to(torch.float32), adversarial, x[:1] * 1e-20


@pytest.mark.parametrize("index", range(4), ids=["random", "bf16", "adversarial", "small"])
def test_nvfp4(index):
    x = nvfp4_blocks()[index]
    encoded = encode(x, "nvfp4")
    global_scale = nvfp4_tensor.per_tensor_amax_to_scale(x.abs().max())
    assert torch.equal(encoded.tensors["global_scale"], global_scale.reshape(1))
    their_scale, their_data = nvfp4_tensor.nvfp4_quantize(x.contiguous(), 16, global_scale)
    their_scale = their_scale.view(torch.uint8)
    scale, codes = encoded.tensors["scale"], unpack(encoded.tensors["codes"], 4, x.shape[1])
    least = torch.tensor(2.0**-6).to(torch.float8_e4m3fn).view(torch.uint8)
    above = scale > least  # torchao floors the block's scale at 2**-6, we do not
    assert torch.equal(scale[above], their_scale[above])
    assert (their_scale[~above] == least).all()
    per_element = above.repeat_interleave(16, 1)
    assert torch.equal(codes[per_element], unpack(their_data, 4, x.shape[1])[per_element])
    if index < 2:
        assert above.float().mean() > 0.9


def test_nvfp4_small_blocks_keep_more_than_torchaos():
    x = torch.randn(4, 64)
    x[0] *= 1e-5
    encoded = encode(x, "nvfp4")
    assert encoded.tensors["scale"].view(torch.float8_e4m3fn).float()[0].max() < 2.0**-6
    assert (decode(encoded)[0] != 0).any()


def test_nvfp4_global_scale_can_be_given():
    x = torch.randn(8, 32)
    amax = nvfp4_global_scale(torch.tensor([[100.0]]))
    encoded = encode(x, "nvfp4", global_scale=amax)
    assert torch.equal(encoded.tensors["global_scale"], amax)
    assert (decode(encoded) - x).abs().max() < 0.5
