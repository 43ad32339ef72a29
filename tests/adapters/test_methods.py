"""Methods as values: printed, parsed, checked; and each written down wherever it has to be."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer.main
from tests.adapters.models import moved
from tests.adapters.test_layers import METHODS

from parco import adapters
from parco.adapters import Bottleneck, DoRA, LoRA, Method, VeRA, parse, peft
from parco.adapters.methods import KNOWN
from parco.cli import program
from parco.trainer import TuneSettings
from parco.trainer.tune import method_of


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


def tuned_by():
    """The names that `parco tune --help` gives for --method."""
    command = typer.main.get_command(program.app).commands["tune"]
    words = next(each.help for each in command.params if each.name == "method").partition(";")[0]
    return [each for each in words.split(", ") if each != "full"]


@pytest.mark.parametrize("name", KNOWN)
def test_a_method_is_written_down_everywhere(name, tmp_path):
    kind = KNOWN[name]
    assert any(type(parse(text)) is kind for text in METHODS), "of tests/adapters/test_layers.py"
    made = {each: parse(method_of(each)) for each in tuned_by()}
    assert any(type(method) is kind for method in made.values()), "in the help of parco tune"
    assert TuneSettings("model", ("data",), method=str(kind())).rate > 0
    guides = Path(__file__).parents[2] / "docs" / "guides"
    assert f"| `{name}(" in (guides / "adapters.md").read_text(encoding="utf-8")
    listed = (guides / "tune.md").read_text(encoding="utf-8")
    assert all(f"`{each}`" in listed for each, method in made.items() if type(method) is kind)

    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(24, 40))

    source, other, x = model(), model(), torch.randn(3, 24)
    adapters.add_(source, kind())
    moved(source)
    adapters.save(source, tmp_path / "saved")
    assert adapters.load_(other, tmp_path / "saved").methods == {"0": kind()}
    other.requires_grad_(False)  # as `add_` leaves the matrix: beside one that trains the sums are in another order
    assert torch.equal(other(x), source(x)) and not torch.equal(other(x), model()(x))


def test_a_method_without_files_of_its_own_is_not_taken_for_another():
    @dataclass(frozen=True)
    class Unknown(Method):
        size: int = 1

    made = torch.nn.Sequential(torch.nn.Linear(24, 40))
    adapters.add_(made, "bottleneck(4)")
    own = made[0].adapters["default"]
    own.method = Unknown()
    with pytest.raises(AssertionError, match=r"unknown\(1\): nothing says how its files are written"):
        peft.config_of(made, {"0": own})
