"""Methods as values: printed, parsed, checked."""

import re

import pytest

from parco.adapters import Bottleneck, DoRA, LoRA, VeRA, parse


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (LoRA(), "lora(16)"),
        (LoRA(8, alpha=8), "lora(8)"),
        (LoRA(8, alpha=16.0, dropout=0.05), "lora(8, alpha=16, dropout=0.05)"),
        (DoRA(4, alpha=0.5, scaling="rslora", init="pissa"), "dora(4, alpha=0.5, scaling=rslora, init=pissa)"),
        (VeRA(seed=3), "vera(256, seed=3)"),
        (Bottleneck(8, "parallel", activation="silu"), "bottleneck(8, placement=parallel, activation=silu)"),
    ],
)
def test_a_method_prints_as_it_is_typed(method, text):
    assert str(method) == text
    assert parse(text) == method
    assert parse(text.replace("(", "( ").replace(",", " ,")) == method


def test_scales():
    assert LoRA(16).scale == 1
    assert LoRA(16, alpha=32).scale == 2
    assert LoRA(16, alpha=32, scaling="rslora").scale == 8
    assert parse("dora") == DoRA()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lorra(4)", "adapter 'lorra(4)' is unknown; known are lora, dora, vera, bottleneck"),
        ("lora(4, beta=2)", "'beta=2' is none of rank, alpha, dropout, scaling, init"),
        ("lora(4, 5)", "'5' is none of"),
        ("lora(0)", "rank=0; a whole number from 1 up"),
        ("lora(four)", "rank='four' is no whole number"),
        ("lora(4, alpha=-1)", "alpha=-1.0; a positive number"),
        ("lora(4, dropout=1)", "dropout=1.0; a number in [0, 1)"),
        ("dora(4, scaling=sqrt)", "dora: scaling='sqrt'; one of lora, rslora"),
        ("vera(8, initial=inf)", "vera: initial=inf; a finite number"),
        ("vera(8, seed=18446744073709551616)", "vera: seed=18446744073709551616; a whole number of 64 bits"),
        ("bottleneck(4, factor=nan)", "bottleneck: factor=nan; a finite number"),
        ("bottleneck(4, activation=swish)", "activation='swish'; one of silu, gelu"),
    ],
)
def test_what_cannot_be_read_is_named(text, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        parse(text)
