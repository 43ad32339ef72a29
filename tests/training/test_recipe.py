"""Recipes are values with a text form."""

import pytest

from parco.formats import parse
from parco.training import RECIPES, Operand, Pair, Recipe
from parco.training.recipe import BF16, NVFP4


@pytest.mark.parametrize("name", RECIPES)
def test_its_text_names_it(name):
    recipe = RECIPES[name]
    assert str(recipe) == name
    assert Recipe.parse(name) is recipe
    changed = recipe.with_(output="fp32 @ bf16+zero", grad_weight="bf16 @ bf16", grad_input="bf16 @ bf16")
    assert changed != recipe
    assert Recipe.parse(str(changed)) == changed
    assert hash(Recipe.parse(str(changed))) == hash(changed)


def test_recipes_compose():
    recipe = NVFP4.with_(grad_input="mxfp8_e5m2+stochastic @ mxfp8_e4m3", ends=0)
    assert recipe.grad_input == Pair(Operand(parse("mxfp8_e5m2"), "stochastic"), Operand(parse("mxfp8_e4m3")))
    assert (recipe.output, recipe.grad_weight) == (NVFP4.output, NVFP4.grad_weight)
    assert str(recipe) == (
        "output=nvfp4 @ nvfp4:16x16; grad_input=mxfp8_e5m2+stochastic @ mxfp8_e4m3; "
        "grad_weight=nvfp4+stochastic+hadamard16 @ nvfp4+hadamard16"
    )
    assert BF16.is_dense
    assert not recipe.is_dense
    assert RECIPES["fp8-delayed"].delayed == ("x", "weight", "grad")
    assert NVFP4.delayed == ()
    sixth = NVFP4.with_(ends=1 / 6)
    assert Recipe.parse(str(sixth)) == sixth


@pytest.mark.parametrize(
    "text", ["fp4_e2m1:row+clamp0.99", "nvfp4+stochastic+clamp0.9995", "mxfp4+dge5", "fp6_e3m2:row+dge2.5+reused"]
)
def test_operands_compose(text):
    assert str(Operand.parse(text)) == text
    assert Operand.parse("fp4_e2m1:row+clamp0.99") == Operand(parse("fp4_e2m1:row"), clamp=0.99)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("fp7", "known are bf16, fp16, fp8-delayed"),
        ("output=bf16 @ bf16", "known are bf16"),
        ("output=bf16; grad_input=bf16 @ bf16; grad_weight=bf16 @ bf16", "written as two operands"),
        ("output=bf16 @ bf16+up; grad_input=bf16 @ bf16; grad_weight=bf16 @ bf16", "'up' is none of nearest"),
        ("output=bf16 @ int9; grad_input=bf16 @ bf16; grad_weight=bf16 @ bf16", "unknown format 'int9'"),
        ("output=bf16 @ bf16; grad_input=bf16 @ bf16; grad_weight=bf16+hadamard16 @ bf16", "the same Hadamard"),
        ("output=bf16 @ bf16; grad_input=bf16 @ bf16; grad_weight=bf16+hadamard8 @ bf16+hadamard8", "hadamard=8"),
        (
            "output=bf16 @ bf16; grad_input=bf16 @ int8:row+reused; grad_weight=bf16 @ bf16",
            "writes this operand as bf16",
        ),
        ("output=bf16 @ bf16; grad_input=bf16+reused @ bf16; grad_weight=bf16 @ bf16", "only x and W are written"),
        ("output=bf16 @ bf16; grad_input=bf16 @ bf16; grad_weight=bf16 @ bf16+stochastic+reused", "neither rounded"),
        ("output=bf16 @ bf16; grad_input=bf16 @ bf16; grad_weight=bf16 @ bf16; ends=2", "a share of the blocks"),
        ("output=bf16 @ bf16; output=bf16 @ bf16; grad_input=bf16 @ bf16; grad_weight=bf16 @ bf16", "unknown recipe"),
        (
            "output=bf16 @ bf16; grad_input=fp8_e5m2:tensor:delayed @ bf16; grad_weight=fp8_e4m3:tensor:delayed @ bf16",
            "it has one delayed scale",
        ),
        ("output=mxfp4+clamp1.5 @ bf16; grad_input=bf16 @ bf16; grad_weight=bf16 @ bf16", "between 0.5 and 1"),
        ("output=bf16+clamp0.99 @ bf16; grad_input=bf16 @ bf16; grad_weight=bf16 @ bf16", "with scales of its own"),
        ("output=bf16 @ mxfp4+dge0.5; grad_input=bf16 @ bf16; grad_weight=bf16 @ bf16", "power, 1 to 100"),
        ("output=bf16 @ int8:row+dge5; grad_input=bf16 @ bf16; grad_weight=bf16 @ bf16", "floats of 4 to 8 bits"),
        ("output=bf16 @ mxfp4+clamp0.9+dge5; grad_input=bf16 @ bf16; grad_weight=bf16 @ bf16", "nor clamped"),
        ("output=mxfp4+dge5 @ bf16; grad_input=bf16 @ bf16; grad_weight=bf16 @ bf16", "the W that `output` multiplies"),
        ("output=bf16 @ bf16; grad_input=bf16 @ mxfp4+dge5; grad_weight=bf16 @ bf16", "the W that `output` multiplies"),
        (
            "output=bf16 @ bf16; grad_input=bf16 @ bf16; "
            "grad_weight=fp8_e5m2:tensor:delayed+hadamard16 @ bf16+hadamard16",
            "before a transform",
        ),
    ],
)
def test_what_is_wrong_is_said(text, reason):
    with pytest.raises(ValueError, match=reason):
        Recipe.parse(text)


def test_what_is_no_text_is_said():
    with pytest.raises(TypeError, match="must be a Recipe or its text"):
        Recipe.parse(None)
