"""Adapters in whole models: what they leave alone, over every storage, switched, mixed, by request."""

import copy
import pickle

import pytest
import torch
from tests.adapters.models import moved
from tests.nn.models import logits, model, tokens

import parco
from parco import adapters
from parco.adapters import DoRA, LoRA
from parco.training import fuse_loss_, prepare_

METHODS = ["lora(4)", "dora(4)", "vera(8)", "bottleneck(4)", "bottleneck(4, placement=parallel)"]


def gradients(made):
    made.zero_grad()
    made(tokens(), labels=tokens()).loss.backward()
    return {name: each.grad for name, each in made.named_parameters() if each.requires_grad}


@pytest.mark.parametrize("text", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2 tied", "mixtral"])
def test_an_adapter_changes_nothing_at_first_and_leaves_no_trace(name, text):
    made = model(name)
    plain, names, kinds = logits(made), list(made.state_dict()), [type(each) for each in made.modules()]
    added = adapters.add_(made, text)
    torch.testing.assert_close(logits(made), plain, rtol=0, atol=1e-5)
    assert set(names) < set(made.state_dict())
    assert sum(each.numel() for each in made.parameters() if each.requires_grad) == added.trained
    found = gradients(made)
    assert found and all(grad is not None for grad in found.values())
    assert all("adapters.default" in each for each in found)
    moved(made)
    changed = logits(made)
    assert (changed - plain).abs().max() > 1e-3
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(logits(twin), changed)
        assert twin.get_submodule(next(iter(added.methods))).adapters is not made
    adapters.set_(made, None)
    assert torch.equal(logits(made), plain)
    adapters.remove_(made, "default")
    assert list(made.state_dict()) == names
    assert [type(each) for each in made.modules()] == kinds
    assert torch.equal(logits(made), plain)


@pytest.mark.parametrize("text", METHODS)
@pytest.mark.parametrize("spec", ["int4:32", "nf4:64", "mxfp4", "factored"])
def test_a_stored_base_gives_the_gradients_of_the_matrix_it_stands_for(spec, text):
    """QLoRA: against the same adapter on the decoded matrices in fp32."""
    stored, dense = model("llama"), model("llama")
    parco.convert_(stored, parco.Factor(rank=16) if spec == "factored" else parco.Quantize(spec))
    for name in parco.nn.linears(dense):
        dense.get_submodule(name).weight.data.copy_(parco.nn.matrix(stored, name))
    for name, parameter in dense.named_parameters():
        if "embed" in name:
            parameter.data.copy_(stored.get_input_embeddings()(torch.arange(len(parameter))).detach())
    for made in (stored, dense):
        torch.manual_seed(0)
        adapters.add_(made, text)
        moved(made)
    torch.testing.assert_close(logits(stored), logits(dense), rtol=1e-4, atol=2e-3 if spec == "factored" else 1e-4)
    found, expected = gradients(stored), gradients(dense)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        # The factors are in bf16, decoded to a matrix in fp32 before it multiplies.
        assert (grad - expected[name]).norm() <= 2e-3 * expected[name].norm() + 1e-6, name


def test_layers_that_follow_a_recipe_and_layers_that_are_fused():
    made = model("llama")
    prepare_(made, "mxfp8")
    recipe = logits(made)
    adapters.add_(made, "lora(4, dropout=0.2)")
    assert torch.equal(logits(made), recipe)
    moved(made).train()
    assert (logits(made.eval()) - recipe).abs().max() > 0.01
    made.train()
    torch.manual_seed(0)
    found = gradients(made)
    made.activation_checkpointing_enable()
    torch.manual_seed(0)
    again = gradients(made)  # draws the same masks
    assert all(torch.equal(grad, again[name]) for name, grad in found.items())
    prepared = prepare_(made, "bf16")  # another recipe, under the same adapters
    assert "model.layers.0.mlp.up_proj" in prepared.recipes
    assert gradients(made).keys() == found.keys()


@pytest.mark.parametrize("base", ["dense", "int4:32"])
def test_blocks_computed_twice_drop_the_same(base):
    made = model("llama")
    if base != "dense":
        parco.convert_(made, parco.Quantize(base))
    adapters.add_(made, "lora(4, dropout=0.2)")
    moved(made).train()
    torch.manual_seed(0)
    found = gradients(made)
    made.activation_checkpointing_enable()
    torch.manual_seed(0)
    again = gradients(made)
    assert all(torch.equal(grad, again[name]) for name, grad in found.items())
    assert any(not torch.equal(grad, found[name]) for name, grad in gradients(made).items())  # another mask


def test_a_fused_model_decodes_with_its_adapters():
    made, fused = model("llama"), model("llama")
    parco.fuse_(fused)
    fuse_loss_(fused)
    for each in (made, fused):
        torch.manual_seed(0)
        adapters.add_(each, "lora(4)")
        moved(each)
    with torch.no_grad():
        expected, found = (
            each.generate(tokens(1), max_new_tokens=6, do_sample=False, pad_token_id=0) for each in (made, fused)
        )
        assert torch.equal(found, expected)
    adapters.remove_(fused, "default")
    with torch.no_grad():
        plain = model("llama").generate(tokens(1), max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert torch.equal(fused.generate(tokens(1), max_new_tokens=6, do_sample=False, pad_token_id=0), plain)
    assert not torch.equal(plain, expected)


def test_adapters_train_under_autocast():
    made = model("llama")
    adapters.add_(made, LoRA(4, alpha=8))
    moved(made)
    expected = gradients(made)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = gradients(made)
    for name, grad in narrow.items():
        assert grad.dtype == torch.float32
        assert (grad - expected[name]).norm() < 0.1 * expected[name].norm()  # some 20 roundings of 2⁻⁹ on the way


@pytest.mark.parametrize("bias", [False, True])
def test_a_small_change_of_a_magnitude_is_seen_in_16_bits(bias):
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=bias)).to(torch.bfloat16)
    x = torch.randn(256, 64, dtype=torch.bfloat16)
    plain = made(x)
    adapters.add_(made, "dora(4)")
    before = made(x)
    assert torch.equal(before, plain)
    made[0].adapters["default"].magnitude.data.mul_(1.003)
    changed = (made(x) - before).detach().double()
    scaled = (before - made[0].bias if bias else before).detach().double()
    # Each number is rounded to one of its neighbours; over 16,384 of them the sum is off by a part of the change.
    assert (changed * scaled).sum() / scaled.square().sum() == pytest.approx(0.003, rel=0.3)


@pytest.mark.parametrize("base", ["dense", "int4:32"])
def test_a_magnitude_is_divided_by_a_norm_in_fp32_under_autocast(base):
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Linear(64, 96))
    if base != "dense":
        parco.convert_(made, parco.Quantize(base))
    adapters.add_(made, "dora(4, alpha=16)")
    moved(made)
    own = made[0].adapters["default"]
    own.reset_magnitude(made[0])
    expected = own.magnitude.clone()
    with torch.autocast("cpu", torch.bfloat16):
        own.reset_magnitude(made[0])
    assert torch.equal(own.magnitude, expected)
    torch.testing.assert_close(expected, own.merged(made[0]).norm(dim=1))


@pytest.mark.parametrize("text", METHODS[:2])
def test_adapted_layers_compile_whole(text):
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.Linear(40, 24))
    adapters.add_(made, text)
    moved(made)
    x = torch.randn(7, 24)
    expected = torch.autograd.grad(made(x).square().sum(), [p for p in made.parameters() if p.requires_grad])
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x).square().sum(), [p for p in made.parameters() if p.requires_grad])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", ["int8:row", "factor(0.5)"])
def test_layers_over_stored_matrices_compile_whole_and_without_a_warning(method, recwarn):
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.Linear(40, 24))
    parco.convert_(made, method)
    adapters.add_(made, "lora(4)")
    moved(made)
    x = torch.randn(7, 24)
    recwarn.clear()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)(x)
    assert [str(each.message) for each in recwarn if "cache" in str(each.message)] == []
    torch.testing.assert_close(compiled, made(x))


def test_tied_weights_stay_tied_and_modules_are_copied():
    made = model("llama tied")
    plain = logits(made)
    added = adapters.add_(made, "lora(4)", ["q_proj"], modules_to_save=["lm_head", "norm"])
    assert added.copies == ("model.norm", "lm_head")
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert "copied lm_head" in str(added)
    assert torch.equal(logits(made), plain)
    moved(made)
    assert (logits(made) - plain).abs().max() > 0.1
    with pytest.raises(ValueError, match=r"lm_head shares its matrix with model\.embed_tokens"):
        adapters.merge_(made)
    adapters.set_(made, None)
    assert torch.equal(logits(made), plain)


def several():
    made = model("gpt2")
    wanted = {"__base__": logits(made)}
    for name, method in (("a", LoRA(4)), ("b", DoRA(8)), ("c", "bottleneck(4)"), ("d", "lora(2)")):
        options = {"modules_to_save": ["ln_f", "lm_head"]} if name == "d" else {}
        adapters.add_(made, method, ["c_attn", "c_proj"], name=name, **options)
        moved(made, seed=len(wanted))
        wanted[name] = logits(made)
    return made, wanted


def test_requests_in_one_batch_equal_one_by_one():
    made, wanted = several()
    assert adapters.names(made) == ("a", "b", "c", "d")
    for names in (["a", "b"], ["c", "__base__"], ["d", "a"], ["b", "b"]):
        with adapters.per_request(made, names):
            found = logits(made)
        for row, name in enumerate(names):
            torch.testing.assert_close(found[row], wanted[name][row], rtol=0, atol=1e-5)
    assert adapters.active(made) == {"d": 1.0}
    assert torch.equal(logits(made), wanted["d"])
    with pytest.raises(ValueError, match="names are 1 and the batch has 2 rows"), adapters.per_request(made, ["a"]):
        logits(made)
    with pytest.raises(ValueError, match="no adapter 'z': the model carries 'a', 'b', 'c', 'd'"):
        adapters.per_request(made, ["a", "z"]).__enter__()
    assert torch.equal(logits(made), wanted["d"])


def test_adapters_are_switched_and_mixed():
    made, wanted = several()
    for name in ("a", "b"):
        adapters.set_(made, name)
        assert torch.equal(logits(made), wanted[name])
    adapters.set_(made, {"a": 0.5, "c": 2.0})
    mixed = logits(made)
    first = made.transformer.h[0].attn.c_attn
    x = torch.randn(3, 48)
    a, c = first.adapters["a"], first.adapters["c"]
    plain = torch.addmm(first.bias, x, first.weight)
    y = plain + 0.5 * x @ a.lora_A.T @ a.lora_B.T
    y = y + 2 * c.up(torch.relu(c.down(y)))
    torch.testing.assert_close(first(x), y)
    assert not torch.equal(mixed, wanted["a"])
    with pytest.raises(ValueError, match="active whole and alone"):
        adapters.set_(made, {"a": 1.0, "b": 1.0})
    assert torch.equal(logits(made), mixed)
