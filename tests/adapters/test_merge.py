"""Merging: exact on dense bases and undone bit by bit, never unasked on others."""

import pytest
import torch
from tests.adapters.models import moved
from tests.nn.models import logits, model

import parco
from parco import adapters
from parco.nn import StoredWeight


def bits(made):
    return {name: tensor.clone() for name, tensor in made.state_dict().items() if "adapters" not in name}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("text", ["lora(4, alpha=8)", "dora(4)", "vera(8)"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_merged_adapter_is_in_the_matrices_and_comes_out_bit_by_bit(name, text):
    made = model(name)
    before = bits(made)
    adapters.add_(made, text)
    moved(made)
    expected = logits(made)
    merged = adapters.merge_(made, reversible=True)
    assert len(merged.layers) == len([key for key in made.state_dict() if key.endswith(("lora_A", "lambda_b"))])
    assert not merged.losses
    torch.testing.assert_close(logits(made), expected, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="is merged"):
        adapters.set_(made, "default")
    with pytest.raises(ValueError, match="is merged: unmerge_ it first"):
        adapters.remove_(made, "default")
    adapters.unmerge_(made)
    assert same(bits(made), before)
    assert torch.equal(logits(made), expected)
    adapters.merge_(made)
    torch.testing.assert_close(logits(made), expected, rtol=0, atol=2e-5)
    assert made.state_dict().keys() == before.keys()
    with pytest.raises(ValueError, match="'default' is not merged, or for good"):
        adapters.unmerge_(made)


def test_the_sum_is_rounded_once():
    made = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False)).to(torch.bfloat16)
    adapters.add_(made, "lora(2, alpha=3)")
    moved(made)
    own = made[0].adapters["default"]
    exact = made[0].weight.float() + 1.5 * own.lora_B @ own.lora_A
    adapters.merge_(made)
    assert torch.equal(made[0].weight, exact.to(torch.bfloat16))


def test_several_come_out_in_the_other_order():
    made = model("llama")
    before = bits(made)
    for name in "ab":
        adapters.add_(made, "lora(4)", name=name, modules_to_save=["norm"] if name == "b" else None)
        moved(made)
        adapters.merge_(made, name, reversible=True)
    with pytest.raises(ValueError, match="'b' was merged after 'a'"):
        adapters.unmerge_(made, "a")
    assert not same(bits(made), before)
    adapters.unmerge_(made, "b")
    with pytest.raises(ValueError, match=r"'a' is merged into .*q_proj reversibly, and taking it out would lose 'b'"):
        adapters.merge_(made, "b")
    adapters.unmerge_(made, "a")
    assert same(bits(made), before)


def test_what_cannot_be_active_beside_another_stays_merged():
    made = model("llama")
    adapters.add_(made, "dora(4)", name="a")
    adapters.add_(moved(made), "lora(4)", name="b")
    adapters.set_(made, "a")
    expected = logits(made)
    adapters.merge_(made, "a", reversible=True)
    adapters.set_(made, "b")
    before, mixed = bits(made), logits(made)
    with pytest.raises(ValueError, match="active whole and alone"):
        adapters.unmerge_(made, "a")
    assert same(bits(made), before) and torch.equal(logits(made), mixed)
    adapters.set_(made, None)
    adapters.unmerge_(made, "a")
    assert torch.equal(logits(made), expected)


def test_a_stored_base_is_rounded_anew_only_where_that_is_asked_for():
    made = model("llama")
    parco.convert_(made, parco.Quantize("int8:32"))
    before = bits(made)
    adapters.add_(made, "lora(4)")
    moved(made)
    expected = logits(made)
    with pytest.raises(ValueError, match=r"q_proj is stored as quantized\(int8:32, 48x48\).*requantize=True.*to_sum_"):
        adapters.merge_(made)
    assert same(bits(made), before) and torch.equal(logits(made), expected)
    merged = adapters.merge_(made, requantize=True, reversible=True)
    assert merged.losses.keys() == set(merged.layers)
    for whole, update in merged.losses.values():
        # Rounding to one of 255 numbers: at most 1/254 of the greatest of 32, and 1/√3 of that as a root mean square.
        assert 0.0005 < whole < 0.012
        assert whole < update < 0.2
    assert "rounding anew lost" in str(merged)
    difference = (logits(made) - expected).abs().max()
    assert 1e-4 < difference < 0.5
    adapters.unmerge_(made)
    assert same(bits(made), before) and torch.equal(logits(made), expected)


@pytest.mark.parametrize("text", ["lora(4, alpha=8)", "vera(8)"])
def test_base_and_factors_become_one_weight(text, tmp_path):
    made = model("llama")
    parco.convert_(made, parco.Quantize("int4:32"))
    adapters.add_(made, text)
    moved(made)
    expected = logits(made)
    names = adapters.to_sum_(made)
    assert len(names) == 14
    torch.testing.assert_close(logits(made), expected, rtol=0, atol=2e-4)
    weight = made.model.layers[0].mlp.up_proj.weight
    rank = text[5]
    assert isinstance(weight, StoredWeight)
    assert str(weight.spec) == (
        f"sum(quantized(int4:32, 88x48), lowrank(dense(fp32, 88x{rank}), dense(fp32, {rank}x48)))"
    )
    assert weight.spec.plan() is not None  # one call multiplies by it
    assert not any("adapters" in name for name in made.state_dict())
    with pytest.raises(ValueError, match="no adapter 'default'"):
        adapters.to_sum_(made)


def test_a_sparse_base_takes_a_term_and_no_sum():
    made = model("llama")
    parco.convert_(made, parco.Prune("2:4"))
    before = bits(made)
    adapters.add_(made, "lora(4)")
    moved(made)
    expected = logits(made)
    with pytest.raises(ValueError, match=r"q_proj is stored as .*, whose zeros have no place for a sum: to_sum_ adds"):
        adapters.merge_(made, requantize=True)
    assert same(bits(made), before) and torch.equal(logits(made), expected)
    assert len(adapters.to_sum_(made)) == 14
    # fp32 sums in another order, through two blocks.
    torch.testing.assert_close(logits(made), expected, rtol=0, atol=2e-4)


def test_the_way_a_stored_matrix_is_multiplied_stays():
    made = model("llama")
    parco.convert_(made, parco.Quantize("int8:32") + parco.Factor(rank=4))
    parco.nn.set_product_(made, "activations(int8)")
    path = "model.layers.0.self_attn.q_proj"
    product = made.get_submodule(path).weight.product
    assert str(product) == "activations(int8)"
    adapters.add_(made, "lora(4, init=loftq)", ["q_proj"])
    assert made.get_submodule(path).weight.product == product
    adapters.merge_(made, requantize=True)
    assert made.get_submodule(path).weight.product == product
    adapters.add_(made, "lora(4)", ["q_proj"])
    adapters.to_sum_(made)
    assert made.get_submodule(path).weight.product == product


def test_what_is_no_matrix_is_not_merged():
    made = model("llama")
    adapters.add_(made, "bottleneck(4)")
    with pytest.raises(ValueError, match=r"bottleneck\(4\) beside .* is a network of its own"):
        adapters.merge_(made)
    adapters.remove_(made, "default")
    adapters.add_(made, "lora(4)")
    with pytest.raises(ValueError, match="is not a stored one; merge_ adds to it exactly"):
        adapters.to_sum_(made)
    parco_made = model("llama")
    parco.convert_(parco_made, parco.Factor(rank=16))
    adapters.add_(parco_made, "dora(4)")
    with pytest.raises(ValueError, match="which no rounding makes: to_sum_ adds a term"):
        adapters.merge_(parco_made, requantize=True)
    with pytest.raises(ValueError, match="is no product of two factors"):
        adapters.to_sum_(parco_made)
