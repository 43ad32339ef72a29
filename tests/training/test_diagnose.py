"""A layer that was made bad is named with its product, and mended."""

import math

import pytest
import torch

from parco.training import (
    RECIPES,
    Finding,
    Reading,
    Readings,
    Recipe,
    Watch,
    diagnose,
    fall_back_,
    prepare_,
    recipes_of,
)
from parco.training.diagnose import promised, raised
from parco.training.recipe import MXFP8, PRODUCTS, Operand


def net():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({name: torch.nn.Linear(64, 64, bias=False) for name in ("first", "middle", "last")})


def step(model, watch, scale=1.0, spread=None, channel=1.0):
    """One step: `scale` is that of the gradient of `middle` alone, `channel` that of a channel of its input."""
    x = torch.randn(256, 64, requires_grad=True)
    gain = torch.ones(64)
    gain[5] = channel
    h = torch.tanh(model["first"](x))
    h = h + (h * (gain - 1)).detach()  # only the activations have an outlier, not the gradients
    y = model["middle"](h) / math.sqrt(64)
    if y.requires_grad:
        y.register_hook(lambda grad: grad * (scale if spread is None else spread))
    model["last"](torch.tanh(y)).square().sum().backward()
    model.zero_grad()
    return watch.step()


def test_a_gradient_that_shrinks_under_a_delayed_scale_is_named_and_mended():
    model = net()
    prepare_(model, "fp8-delayed")
    watch = Watch(model, every=1)
    for _ in range(3):
        step(model, watch)
    assert diagnose(watch.history) == []
    step(model, watch, scale=1e-10)
    found = diagnose(watch.history)
    # The layers before it get what it passes on: their gradients shrink as well.
    named = {(each.layer, each.product) for each in found}
    assert {("middle", "grad_input"), ("middle", "grad_weight")} <= named
    assert not [layer for layer, _ in named if layer == "last"]
    assert not [product for _, product in named if product == "output"]
    assert all("became 0" in each.why for each in found)
    scale = model["middle"].x_scale.clone()
    said = fall_back_(model, [each for each in found if each.layer == "middle"])
    moved = "from fp8_e5m2:tensor:delayed @ fp8_e4m3:tensor:delayed to mxfp8_e4m3 @ mxfp8_e4m3"
    assert sorted(said) == [f"middle grad_input: {moved}", f"middle grad_weight: {moved}"]
    assert recipes_of(model)["last"] == "fp8-delayed"
    assert "output=fp8_e4m3:tensor:delayed" in recipes_of(model)["middle"]
    assert torch.equal(model["middle"].x_scale, scale)
    assert "grad_scale" not in dict(model["middle"].named_buffers())
    mended = step(model, watch, scale=1e-10)
    snr = {(each.layer, each.product, each.operand): each.snr_db for each in mended.operands}
    assert snr["middle", "grad_input", "grad"] > 25
    assert snr["middle", "grad_weight", "grad"] > 25
    assert not [each for each in diagnose(watch.history) if each.layer == "middle"]


def test_tokens_whose_gradients_are_far_apart_are_named():
    """One scale for all tokens: beside one of 1e12 the others vanish, though the ratio of squares does not show it."""
    model = net()
    prepare_(model, "fp8-current")
    watch = Watch(model, every=1)
    spread = torch.full((256, 1), 1e-12)
    spread[7] = 1
    found = diagnose(step(model, watch, spread=spread))
    assert {(each.layer, each.product) for each in found if each.layer != "first"} == {
        ("middle", "grad_input"), ("middle", "grad_weight")
    }  # fmt: skip
    fall_back_(model, found)
    after = {(each.layer, each.product) for each in diagnose(step(model, watch, spread=spread))}
    assert ("middle", "grad_input") not in after


def test_an_outlier_channel_is_named_and_mended():
    model = net()
    prepare_(model, "int8")
    watch = Watch(model, every=1)
    assert diagnose(step(model, watch)) == []
    found = diagnose(step(model, watch, channel=1000.0))
    assert [(each.layer, each.product) for each in found] == [("middle", "output")]
    assert "x in int8:row" in found[0].why
    said = fall_back_(model, found)
    assert said == ["middle output: from int8:row @ int8:row to mxfp8_e4m3 @ mxfp8_e4m3"]
    assert diagnose(step(model, watch, channel=1000.0)) == []


@pytest.mark.parametrize("name", RECIPES)
def test_a_healthy_run_is_left_alone(name):
    model = net()
    prepare_(model, RECIPES[name].with_(ends=0))
    watch = Watch(model, every=1)
    for _ in range(3):
        step(model, watch)
    assert diagnose(watch.history) == []
    assert len(watch.history[-1].operands) == 18


def reading(snr_db, written="mxfp8_e4m3", operand="x", product="output", underflow=0.0):
    return Reading("layer", product, operand, written, snr_db, underflow, 0.0, 1.0)


def judged(*snr_db, **options):
    history = [Readings(step, (reading(each, **options),), {}) for step, each in enumerate(snr_db, 1)]
    return diagnose(history)


def test_what_counts_as_a_fault():
    assert promised(Operand.parse("mxfp8_e4m3")) == pytest.approx(28.85, abs=0.01)
    assert promised(Operand.parse("nvfp4+stochastic")) == pytest.approx(13.8, abs=0.01)
    assert promised(Operand.parse("int8:row")) == pytest.approx(28.8, abs=0.05)
    assert promised(Operand.parse("ternary")) is None
    assert not judged(23)
    assert "promises 28.9" in judged(22)[0].why
    assert "fell from 32.0 to 25.0" in judged(32, 31, 33, 25)[0].why
    assert not judged(32, 31, 33, 29)
    assert "fell from" in judged(8, 8, 1, written="ternary")[0].why
    assert "drowns" in judged(4, written="ternary", operand="grad", product="grad_weight")[0].why
    assert "became 0" in judged(40, underflow=0.6)[0].why
    assert not judged(math.nan)
    assert judged(-math.inf)
    with pytest.raises(ValueError, match="nothing to judge"):
        diagnose([])


def test_the_noisiest_comes_first():
    pair = (reading(10), reading(20, operand="weight"), reading(5, operand="grad", product="grad_input"))
    found = diagnose(Readings(1, pair, {}))
    assert [each.product for each in found] == ["grad_input", "output"]
    assert found[1].noise == pytest.approx(0.11)
    assert "weight in mxfp8" in found[1].why
    assert "x in mxfp8" in found[1].why


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("product", PRODUCTS)
def test_the_ladder_ends_in_bf16(name, product):
    recipe, steps = RECIPES[name], 0
    while (higher := raised(recipe, product)) is not None:
        assert higher.pair(product) != recipe.pair(product)
        for other in set(PRODUCTS) - {product}:
            follows = product == "output" and recipe.pair(other).right.reused
            assert (higher.pair(other) != recipe.pair(other)) == follows
        assert Recipe.parse(str(higher)) == higher
        recipe, steps = higher, steps + 1
    assert {str(operand.format) for operand in recipe.pair(product)} == {"bf16"}
    assert steps <= 2
    if name in ("nvfp4", "mxfp4", "int8"):
        first = raised(RECIPES[name], product)
        assert first is not None
        assert first.pair(product) == MXFP8.pair(product)


def test_what_cannot_move_is_said():
    model = net()
    prepare_(model, "bf16")
    assert fall_back_(model, [Finding("last", "output", "", 0.1)]) == [
        "last output: stays bf16 @ bf16, there is nothing higher"
    ]
    with pytest.raises(ValueError, match="'lost' is no prepared layer"):
        fall_back_(model, [Finding("lost", "output", "", 0.1)])


def test_what_reuses_the_output_follows_it():
    model = net()
    prepare_(model, "fp4-dge")
    said = fall_back_(model, [Finding("last", "output", "", 0.1)])
    assert said[0].startswith("last output: from fp4_e2m1:row+clamp0.99 @ fp4_e2m1:row+dge5 to mxfp8_e4m3 @ mxfp8_e4m3")
    assert "grad_weight" in said[0]
    assert model["last"]._recipe.grad_input.right == Operand.parse("mxfp8_e4m3+reused")
    assert str(model["last"]._recipe.grad_input.left) == "fp8_e5m2:tensor"
    watch = Watch(model, every=1)
    assert diagnose(step(model, watch)) == []
