import pytest
import torch

from parco import formats
from parco.formats import (
    E2M1,
    E4M3,
    NF4,
    ROW,
    TENSOR,
    TERNARY,
    TERNARY5,
    Block,
    Float,
    Format,
    ScaleAbsmax,
    ScaleAbsmean,
    ScaleDelayed,
    ScaleE4M3,
    ScaleE8M0,
    ScaleRange,
    Unscaled,
    group,
    integer,
)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("bf16", (formats.BF16, TENSOR, Unscaled())),
        ("int4:32", (integer(4), group(32), ScaleAbsmax(torch.bfloat16))),
        ("int4:32:fp32", (integer(4), group(32), ScaleAbsmax(torch.float32))),
        ("int8:row", (integer(8), ROW, ScaleAbsmax(torch.float32))),
        ("int3:64:asym:fp16", (integer(3), group(64), ScaleRange(torch.float16))),
        ("nf4:64", (NF4, group(64), ScaleAbsmax(torch.bfloat16))),
        ("ternary", (TERNARY, TENSOR, ScaleAbsmean())),
        ("ternary5", (TERNARY5, TENSOR, ScaleAbsmean())),
        ("fp8_e4m3:1x128", (E4M3, group(128), ScaleAbsmax())),
        ("fp8_e4m3:128x128:pow2", (E4M3, Block(128, 128), ScaleAbsmax(power_of_two=True))),
        ("fp8_e4m3:tensor:delayed", (E4M3, TENSOR, ScaleDelayed())),
        ("mxfp4:floor", (E2M1, group(32), ScaleE8M0("floor"))),
        ("nvfp4:16x16", (E2M1, Block(16, 16), ScaleE4M3())),
    ],
)
def test_names_and_values(text, parts):
    assert formats.parse(text) == Format(*parts)
    assert str(Format(*parts)) == text


@pytest.mark.parametrize(
    ("spelled", "canonical"),
    [
        ("int4:1x32", "int4:32"),
        ("int4:32:bf16", "int4:32"),
        ("int8:row:fp32", "int8:row"),
        ("fp8_e4m3:128", "fp8_e4m3:1x128"),
        ("mxfp4:rceil", "mxfp4"),
        ("nvfp4:16", "nvfp4"),
        ("ternary:tensor", "ternary"),
        (" int4:32 ", "int4:32"),
    ],
)
def test_other_spellings_are_the_same_value(spelled, canonical):
    assert formats.parse(spelled) == formats.parse(canonical)
    assert str(formats.parse(spelled)) == canonical


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("int9:32", "no element is called 'int9'"),
        ("", "no element is called ''"),
        ("int4", "int4 needs a block, such as int4:32 or int4:row"),
        ("int4:17", "block columns=17: must be None .all., 1 or a positive multiple of 16"),
        ("int4:rows", "block 'rows': must be tensor, row"),
        ("int4:32:bf17", "int4 does not take 'bf17' here"),
        ("int4:32:fp32:asym", "int4 does not take 'asym' here .order: block, asym, scale dtype."),
        ("fp32:row", "fp32 takes no block and no scale"),
        ("fp8_e4m3:row:asym", "fp8_e4m3 cannot be asymmetric"),
        ("ternary:row:asym", "ternary cannot be asymmetric"),
        ("ternary5:row:pow2", "ternary5 does not take 'pow2'"),
        ("int4:row:pow2", "a power-of-two fp32 scale is for floats"),
        ("nvfp4:32", "an NVFP4 block is 1x16 or 16x16"),
        ("mxfp4:up", "scale rule 'up' is none of floor, ceil, even, rceil"),
    ],
)
def test_an_unknown_text_is_told_why_and_what_exists(text, reason):
    with pytest.raises(ValueError, match=f"unknown format {text!r}: .*{reason}.*Known: fp32, bf16"):
        formats.parse(text)


def test_what_is_no_text_is_a_type_error():
    with pytest.raises(TypeError, match="format 4: must be a text"):
        formats.parse(4)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ((E4M3, group(32), ScaleRange()), "only integers can be asymmetric"),
        ((integer(4), TENSOR, Unscaled()), "only floating-point elements go without a scale"),
        ((formats.FP32, ROW, ScaleAbsmax()), "take no scale"),
        ((E4M3, group(64), ScaleE8M0()), "an MX block is 1x32"),
        ((integer(8), group(32), ScaleE8M0()), "e8m0 scales are for floats"),
        ((E4M3, group(16), ScaleE4M3()), "NVFP4's, whose element is fp4_e2m1"),
        ((E2M1, group(32), ScaleE4M3()), "1x16 or 16x16"),
        ((TERNARY, ROW, ScaleAbsmax()), "ternary takes the absmean scale"),
        ((TERNARY5, ROW, ScaleRange()), "only integers can be asymmetric"),
        ((integer(4), ROW, ScaleAbsmean()), "absmean scale is ternary's"),
        ((integer(4), ROW, ScaleAbsmax(power_of_two=True)), "for floats"),
        ((E4M3, ROW, ScaleDelayed()), "one per tensor"),
        ((E4M3, ROW, Unscaled()), "no blocks"),
    ],
)
def test_parts_that_do_not_go_together(parts, reason):
    with pytest.raises(ValueError, match=reason):
        Format(*parts)


def test_values_are_checked():
    with pytest.raises(ValueError, match="bits=9"):
        integer(9)
    with pytest.raises(ValueError, match="rule='up'"):
        ScaleE8M0("up")
    for scale in (ScaleAbsmax, ScaleRange, ScaleAbsmean):
        with pytest.raises(ValueError, match=r"scale dtype=torch.int8"):
            scale(torch.int8)
    for shape in [(3,), (2, 3, 4), (-1, 3), (3, 0)]:
        with pytest.raises(ValueError, match="describes a matrix"):
            formats.INT4.tensors(shape)


@pytest.mark.parametrize(
    ("block", "scale", "text"),
    [
        (TENSOR, Unscaled(), "{name}"),
        (ROW, ScaleAbsmax(), "{name}:row"),
        (TENSOR, ScaleDelayed(), "{name}:tensor:delayed"),
        (group(32), ScaleE8M0(), "mx{name}"),
        (group(32), ScaleE8M0("floor"), "mx{name}:floor"),
    ],
)
@pytest.mark.parametrize("name", ["mine", "fp8_e4m3"])
def test_an_element_of_ones_own_is_printed_and_known_to_have_no_name(block, scale, text, name):
    format = Format(Float(name, 5, 1, 15, "none"), block, scale)
    assert str(format) == text.format(name=name)
    assert not format.is_named


def test_every_name_is_canonical():
    assert [str(formats.parse(name)) for name in formats.NAMES] == list(formats.NAMES)
    assert len(set(formats.NAMES)) == len(formats.NAMES)


def test_bytes_of_a_matrix():
    assert formats.parse("int4:32").nbytes((1024, 4096)) == 1024 * 4096 // 2 + 2 * 1024 * 4096 // 32
    assert formats.parse("int3:64").nbytes((2, 100)) == 2 * 38 + 2 * 2 * 2
    assert formats.parse("mxfp8_e4m3").nbytes((2, 33)) == 66 + 4
    assert formats.NVFP4.nbytes((4, 32)) == 64 + 8 + 4
    assert formats.parse("int4:32:asym").nbytes((1, 32)) == 16 + 2 + 1
    assert formats.parse("fp8_e4m3:128x128").nbytes((129, 128)) == 129 * 128 + 2 * 4
