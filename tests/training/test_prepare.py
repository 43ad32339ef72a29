"""prepare_ on whole models."""

import copy
import pickle
import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from parco.nn import fuse_
from parco.training import RECIPES, prepare_, recipes_of
from parco.training.recipe import BF16, MXFP8, NVFP4

TOKENS = torch.randint(0, 90, (4, 24), generator=torch.Generator().manual_seed(0))


def llama(layers=4, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=90, num_hidden_layers=layers, **sizes, **options))


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=90, n_embd=32, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    )


def losses(model, steps=25, rate=3e-3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    found = []
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_every_recipe_learns(make, name):
    """As far as fp32 does in as many steps: half the way at least, with four bits."""
    model = make()
    plain = losses(copy.deepcopy(model))
    prepared = prepare_(model, name)
    assert set(prepared.recipes.values()) <= {RECIPES[name], BF16}
    torch.manual_seed(5)
    found = losses(model)
    assert found[0] - found[-1] > 0.5 * (plain[0] - plain[-1])
    assert found != plain


def test_the_recipe_reaches_the_layers_that_it_should():
    prepared = prepare_(llama(), "nvfp4")
    kept = {name for name, recipe in prepared.recipes.items() if recipe == BF16}
    assert {name.split(".")[2] for name in kept if "layers" in name} == {"3"}
    assert "lm_head" in kept
    assert prepared.recipes["model.layers.0.mlp.down_proj"] == NVFP4
    assert len(prepared.recipes) == 4 * 7 + 1
    assert "21 layers: nvfp4" in str(prepared)
    assert prepare_(llama(), "bf16").recipes["lm_head"] == BF16
    some = prepare_(llama(), "int8", lambda module, name: name.endswith("lm_head"))
    assert {name: str(recipe) for name, recipe in some.recipes.items()} == {"lm_head": "int8"}
    assert some.left["model.layers.0.self_attn.q_proj"] == "filter_fn says no"
    again = llama()
    prepare_(again, "fp8-delayed")
    prepare_(again, "mxfp8")
    assert set(again.state_dict()) == set(llama().state_dict())


def test_patterns_choose_recipes():
    model = llama()
    prepared = prepare_(model, {"*.mlp.*": "mxfp8", "model.layers.0.*": NVFP4, "*.v_proj": "bf16"})
    assert prepared.recipes["model.layers.0.mlp.up_proj"] == MXFP8
    assert prepared.recipes["model.layers.0.self_attn.v_proj"] == NVFP4
    assert prepared.recipes["model.layers.1.self_attn.v_proj"] == BF16
    assert set(prepared.left) == {
        "lm_head", *(f"model.layers.{i}.self_attn.{name}_proj" for i in (1, 2, 3) for name in "qko")
    }  # fmt: skip
    assert prepared.left["lm_head"] == "matches none of *.mlp.*, model.layers.0.*, *.v_proj"
    everywhere = prepare_(llama(), {"model.layers.3.*": "nvfp4", "*": "nvfp4"}).recipes
    assert {everywhere["lm_head"], everywhere["model.layers.3.mlp.up_proj"]} == {BF16}
    for pattern in ("*.mpl.*", "model.layers.9.mlp.up_proj"):
        with pytest.raises(ValueError, match=re.escape(f"pattern {pattern!r} matches no linear layer")):
            prepare_(llama(), {pattern: "mxfp8", "*": "bf16"})
    with pytest.raises(ValueError, match="unknown recipe 'fp3'"):
        prepare_(llama(), {"*": "fp3"})


def test_recipes_are_restored_layer_by_layer():
    model = llama()
    prepare_(model, {"*": "fp8-delayed", "lm_head": "int8"})  # named in full: a head follows too
    prepare_(model, {"*.3.mlp.*": "nvfp4", "*.0.*": NVFP4.with_(ends=0, output="bf16 @ bf16")})
    saved = recipes_of(model)
    assert saved["lm_head"] == "int8"
    assert saved["model.layers.3.mlp.up_proj"] == "bf16"  # in a block at the ends
    assert saved["model.layers.0.mlp.up_proj"].startswith("output=bf16 @ bf16; ")
    assert saved["model.layers.1.mlp.up_proj"] == "fp8-delayed"
    losses(model, 2)
    twin = llama()
    prepared = prepare_(twin, saved)
    assert recipes_of(twin) == saved
    assert {name: str(recipe) for name, recipe in prepared.recipes.items()} == saved
    twin.load_state_dict(model.state_dict())
    found = []
    for each in (model, twin):
        torch.manual_seed(1)
        found.append(losses(each, 3))
    assert found[0] == found[1]


def test_experts_and_routers_stay():
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=2,
        )
    )  # fmt: skip
    prepared = prepare_(model, "mxfp8")
    assert not [name for name in prepared.recipes if "expert" in name or "gate" in name]
    assert "experts in one tensor are not converted" in prepared.left.values()


def test_names_parameters_ties_and_classes_stay():
    model = llama(tie_word_embeddings=True)
    before, kinds = dict(model.named_parameters()), {name: type(m).__name__ for name, m in model.named_modules()}
    prepare_(model, "bf16")
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert kinds == {name: type(m).__name__ for name, m in model.named_modules()}
    assert isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_follow_the_same_recipe(copied):
    model = llama(2)
    prepare_(model, "fp8-delayed")
    losses(model, 2)
    twin = copied(model)
    assert losses(twin, 3) == losses(model, 3)


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "fp8-delayed"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(name, reentrant):
    found = []
    for checkpointing in (False, True):
        model = llama()
        prepare_(model, RECIPES[name])
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            torch.manual_seed(9)
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_a_fused_model_trains_the_same_way():
    """Fused norms and gates round otherwise; the products are the recipe's."""
    models = [llama(2), llama(2)]
    fuse_(models[1])
    found = []
    for model in models:
        prepare_(model, RECIPES["mxfp8"])
        fuse_(model)
        found.append(losses(model, 5))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_prepared_and_fused_model_decodes_by_its_recipe():
    """One cached token, which a fused decoder would take in one call of its own."""
    models = [llama(2), llama(2)]
    for model in models:
        prepare_(model, RECIPES["mxfp4"])
    for fused in (models[1], llama(2)):
        fuse_(fused)
        if fused is not models[1]:
            prepare_(fused, RECIPES["mxfp4"])
            models.append(fused)
    found = []
    for model in models:
        model.eval()
        with torch.no_grad():
            known = model(input_ids=TOKENS[:1, :8], use_cache=True).past_key_values
            for place in (8, 9, 10):
                token = TOKENS[:1, place : place + 1]
                logits = model(input_ids=token, past_key_values=known, use_cache=True).logits
        found.append(logits)
    assert torch.allclose(found[0], found[1], atol=1e-4)
    assert torch.allclose(found[0], found[2], atol=1e-4)


def test_delayed_scales_stay_in_fp32_and_start_anew_from_meta():
    model = torch.nn.Sequential(torch.nn.Linear(16, 8, bias=False))
    prepare_(model, "fp8-delayed")
    model(torch.randn(4, 16)).backward(torch.full((4, 8), 1e-6))
    scale = model[0].grad_scale.clone()
    model.half()
    assert model[0].weight.dtype == torch.float16
    assert torch.equal(model[0].grad_scale, scale)
    assert model[0].grad_history.dtype == torch.float32
    with torch.device("meta"):
        empty = torch.nn.Sequential(torch.nn.Linear(16, 8, bias=False))
    prepare_(empty, "fp8-delayed")
    empty.to_empty(device="cpu")
    assert empty[0].x_scale.tolist() == [[1.0]]
    assert not empty[0].x_history.any()


def test_layers_that_would_not_follow_are_named():
    class Own(torch.nn.Linear):
        def forward(self, x):
            return x

    class Conv1D(torch.nn.Linear):
        """Not GPT-2's, whose weight lies the other way round."""

    model = torch.nn.ModuleDict(
        {"own": Own(8, 8), "replaced": torch.nn.Linear(8, 8), "named": Conv1D(8, 8), "plain": torch.nn.Linear(8, 8)}
    )
    model["replaced"].forward = lambda x: x
    prepared = prepare_(model, "nvfp4")
    assert set(prepared.recipes) == {"named", "plain"}
    assert "forward of its own" in prepared.left["own"]
    assert "has been replaced" in prepared.left["replaced"]
    assert "no repeated blocks" in prepared.left["ends"]
    assert "recipe=nvfp4" in repr(model["plain"])
    x = torch.randn(4, 8)
    prepare_(model, "bf16")
    assert torch.allclose(model["named"](x), torch.nn.functional.linear(x, *model["named"].parameters()), atol=0.1)


def test_under_autocast_the_output_has_its_dtype():
    model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    prepare_(model, "mxfp8")
    x = torch.randn(4, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert (x.grad.dtype, model[0].weight.grad.dtype) == (torch.float32, torch.float32)


def test_what_cannot_be_prepared_is_said():
    with pytest.raises(ValueError, match="unknown recipe 'fp3'"):
        prepare_(torch.nn.Linear(4, 4), "fp3")
    with pytest.raises(ValueError, match="no linear layer that takes part"):
        prepare_(torch.nn.LayerNorm(4), "bf16")
    with pytest.raises(TypeError, match="must be a torch"):
        prepare_("model", "bf16")
