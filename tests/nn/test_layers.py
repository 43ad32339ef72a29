"""Fused decoder layers of other kinds than Llama's: orders of their parts, windows, masks, weights held transposed."""

import copy
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers as t
from tests.nn import models
from tests.nn.conftest import Calls
from tests.nn.test_decode import TOKENS, agree, steps
from tests.nn.test_fuse import apart
from transformers import DynamicCache

import parco
from parco.nn import fuse_

NEOX = {key: value for key, value in models.COMMON.items() if key != "num_key_value_heads"}
WINDOWED = {"sliding_window": 7, "max_position_embeddings": 256, "num_hidden_layers": 3}


def made(config: Any, seed: int = 0) -> Any:
    """The model of a configuration, its weights as those of `models.model`."""
    torch.manual_seed(seed)
    found = t.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in found.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * 0.15 if parameter.dim() > 1 else parameter + noise / 9)
    return found.eval()


OTHERS = {
    "neox, one after the other": lambda: t.GPTNeoXConfig(**NEOX, use_parallel_residual=False, hidden_act="gelu_new"),
    "neox, all turning": lambda: t.GPTNeoXConfig(**NEOX, rotary_pct=1.0),
    "phi, heads normalized": lambda: t.PhiConfig(**models.COMMON, qk_layernorm=True, hidden_act="relu"),
    "phi, odd": lambda: t.PhiConfig(
        **{
            **models.COMMON,
            "hidden_size": 36,
            "intermediate_size": 77,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
        }
    ),
    "gpt2, scaled by layer": lambda: t.GPT2Config(
        vocab_size=101, n_embd=36, n_layer=2, n_head=3, n_inner=50, n_positions=64, scale_attn_by_inverse_layer_idx=True
    ),
    "gemma2, capped": lambda: t.Gemma2Config(**models.COMMON, head_dim=12, attn_logit_softcapping=0.4),
    "llama, eager": lambda: t.LlamaConfig(**models.COMMON, attn_implementation="eager"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_orders_and_numbers(name: str, calls: Calls) -> None:
    plain = made(OTHERS[name]())
    expected = steps(plain)
    fused = copy.deepcopy(plain)
    assert len(fuse_(fused).fused["layer"]) == 2
    calls.clear()
    agree(steps(fused), expected)
    assert calls == [1, 1, 2, 2, 2, 2]
    found = [each.generate(TOKENS[:, :4], max_new_tokens=12, do_sample=False) for each in (fused, plain)]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "config",
    [
        lambda: t.MistralConfig(**{**models.COMMON, **WINDOWED}),
        lambda: t.Gemma2Config(**{**models.COMMON, **WINDOWED}, head_dim=12),
        lambda: t.Gemma3TextConfig(
            **{**models.COMMON, **WINDOWED},
            head_dim=12,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ],
    ids=["mistral", "gemma2", "gemma3"],
)
def test_windows_slide(config: Any, calls: Calls) -> None:
    plain = made(config())
    fused = copy.deepcopy(plain)
    assert len(fuse_(fused).fused["layer"]) == 3
    caches = DynamicCache(config=fused.config), DynamicCache(config=plain.config)
    text = models.tokens(1, 90)
    with torch.inference_mode():
        for model, cache in zip((fused, plain), caches, strict=True):
            model(text[:, :3], past_key_values=cache)
        for i in range(3, 90):
            token = text[:, i : i + 1]
            calls.clear()
            logits = [m(token, past_key_values=c).logits for m, c in zip((fused, plain), caches, strict=True)]
            agree(logits[:1], logits[1:])
            assert sum(calls) >= 3
            for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
                assert ours.get_seq_length() == theirs.get_seq_length() == i + 1
                torch.testing.assert_close((ours.keys, ours.values), (theirs.keys, theirs.values))
    assert len(calls) == (3 if fused.config.model_type == "gemma3_text" else 1)  # angles differ by kind of layer


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_mask_that_hides_a_token_is_asked(implementation: str, calls: Calls) -> None:
    plain = models.model("llama")
    plain.set_attn_implementation(implementation)
    fused = copy.deepcopy(plain)
    fuse_(fused)
    for first, taken in ((1, True), (0, False)):
        mask = torch.tensor([[first, 1, 1, 1, 1]])
        calls.clear()
        logits = []
        with torch.inference_mode():
            for model in (fused, plain):
                out = model(TOKENS[:, :4], attention_mask=mask[:, :4], use_cache=True)
                logits.append(model(TOKENS[:, 4:5], attention_mask=mask, past_key_values=out.past_key_values).logits)
        agree(logits[:1], logits[1:])
        assert bool(calls) == taken


def test_softcapping_is_not_dropped_where_sdpa_refuses_it() -> None:
    model = made(OTHERS["gemma2, capped"]())
    fuse_(model)
    steps(model)
    cache = model(TOKENS[:, :3], use_cache=True).past_key_values
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="softcap"), torch.inference_mode():
        model(TOKENS[:, 3:4], past_key_values=cache)


def test_a_changed_flag_or_activation_is_the_modules() -> None:
    plain = made(t.GPTNeoXConfig(**NEOX))
    fused = copy.deepcopy(plain)
    fuse_(fused)
    before = steps(fused)
    for model in (fused, plain):
        model.gpt_neox.layers[1].use_parallel_residual = False
    agree(steps(fused), steps(plain))
    assert apart(steps(fused)[0], before[0]) > 1e-3
    for model in (fused, plain):
        model.gpt_neox.layers[0].mlp.act = torch.nn.ReLU()
    agree(steps(fused), steps(plain))


class Conv1D(torch.nn.Module):
    """Another one of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.nf, self.weight, self.bias = 5, torch.nn.Parameter(torch.randn(5, 5)), torch.nn.Parameter(torch.randn(5))

    def forward(self, x):
        return x @ self.weight.t() + self.bias


def test_another_conv1d_is_left() -> None:
    fusion = fuse_(torch.nn.Sequential(Conv1D()))
    assert not fusion.fused
    assert "something else than a linear layer" in fusion.left["0"]


def test_a_padded_sequence_takes_no_room() -> None:
    fused = models.model("llama")
    fuse_(fused)
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    with torch.inference_mode():
        out = fused(TOKENS[:, :4], attention_mask=mask[:, :4], use_cache=True)
        out = fused(TOKENS[:, 4:5], attention_mask=mask, past_key_values=out.past_key_values)
    assert not any("_parco_room" in layer.__dict__ for layer in out.past_key_values.layers)


def test_a_dropout_alone_that_trains_drops(calls: Calls) -> None:
    fused = models.model("gpt2")
    fuse_(fused)
    expected = steps(fused)
    fused.transformer.h[0].mlp.dropout.train()
    calls.clear()
    assert apart(steps(fused)[0], expected[0]) > 1e-3
    fused.eval()
    assert all(map(torch.equal, steps(fused), expected))


def test_transposed_weights_train_and_save(tmp_path: Any, calls: Calls) -> None:
    plain = models.model("gpt2")
    fused = copy.deepcopy(plain)
    state = {name: value.clone() for name, value in fused.state_dict().items()}
    fuse_(fused)
    expected = steps(fused)
    for name, value in fused.state_dict().items():
        assert value.is_contiguous(), name
        assert torch.equal(value, state[name])
    safetensors.torch.save_file({k: v for k, v in fused.state_dict().items() if k != "lm_head.weight"}, tmp_path / "it")
    fused.save_pretrained(tmp_path / "saved")
    loaded = t.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    fuse_(loaded)
    torch.save(fused, tmp_path / "model.pt")
    for twin in (copy.deepcopy(fused), loaded, torch.load(tmp_path / "model.pt", weights_only=False)):
        calls.clear()
        assert all(map(torch.equal, steps(twin), expected))
        assert 2 in calls
    for model in (fused, plain):
        model(models.tokens(), labels=models.tokens()).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert b.grad.shape == a.grad.shape
        assert apart(b.grad, a.grad) < 1e-4, name
    fused.load_state_dict(state, assign=True)  # by columns again: the modules
    agree(steps(fused), expected)
    fused = models.model("gpt2", torch.bfloat16)
    fuse_(fused)
    parco.convert_(fused, "int8:row")
    assert type(fused.transformer.h[0].attn.c_attn) is parco.nn.Linear
    calls.clear()
    steps(fused)
    assert calls


def test_a_new_models_equal_norms_are_told_apart() -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer

    class Exchanged(Gemma2DecoderLayer):
        def forward(self, hidden_states, **kwargs):
            residual = hidden_states
            hidden_states, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden_states = residual + self.pre_feedforward_layernorm(hidden_states)
            residual = hidden_states
            hidden_states = self.mlp(self.post_attention_layernorm(hidden_states))
            return residual + self.post_feedforward_layernorm(hidden_states)

    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(models.CONFIGS["gemma2"]()).eval()  # its norms are all zeros
    model.model.layers[1].__class__ = Exchanged
    weights = [norm.data_ptr() for norm in model.parameters()]
    fusion = fuse_(model)
    assert fusion.fused["layer"] == ("model.layers.0",)
    assert "in any known order" in fusion.left["model.layers.1"]
    assert not any(p.any() for name, p in model.named_parameters() if "norm" in name)
    assert weights == [norm.data_ptr() for norm in model.parameters()]


def test_what_trains_with_dropout_is_left_and_named() -> None:
    fusion = fuse_(models.model("gpt2").train())
    assert "layer" not in fusion.fused
    assert "trained, with dropout" in fusion.left["transformer.h.0"]
