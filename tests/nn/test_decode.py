"""A fused decoder's layers: one call for a token gives what the modules give, and whatever else is asked of them is
theirs.
"""

import copy
from typing import Any

import pytest
import torch
from tests.laws.weight_laws import stored_tensors
from tests.nn import models
from tests.nn.conftest import Calls
from tests.nn.test_fuse import apart
from transformers import DynamicCache

import parco
from parco import nn
from parco.nn import fuse_, proofs
from parco.nn.prepared import groups
from parco.weights import Dense, LowRank, Quantized, Sum, Weight

WHOLE = ["llama", "llama tied", "llama odd", "mistral", "qwen2 tied", "qwen3", "gemma"]
WHOLE += ["gpt2", "gpt-neox", "phi", "phi3", "gemma2", "gemma3", "mixtral", "qwen2-moe", "qwen3-moe"]
TOKENS = models.tokens(1, 12)


def steps(made: Any, count: int = 5, cache: Any = None, start: int = 4) -> list[torch.Tensor]:
    """Logits of a few tokens, one at a time, after a prompt of `start`."""
    with torch.inference_mode():
        out = made(TOKENS[:, :start], use_cache=True, past_key_values=cache)
        found = []
        for i in range(start, start + count):
            out = made(TOKENS[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    return found


def last(made: Any, **asked: bool) -> Any:
    """What a model gives for the last of a few tokens, of which more is asked than logits."""
    with torch.inference_mode():
        out = made(TOKENS[:, :4], use_cache=True)
        for i in range(4, 7):
            out = made(TOKENS[:, i : i + 1], past_key_values=out.past_key_values, **asked)
    return out


def agree(found: list[torch.Tensor], expected: list[torch.Tensor], bound: float = 2e-6) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert apart(mine, theirs) < bound


@pytest.mark.parametrize("stored", [None, "bf16", "int4:16", "int8:row", "fp8_e4m3:row", "nf4:16"])
@pytest.mark.parametrize("name", WHOLE)
def test_every_architecture_decodes_the_same_in_one_call_a_token(name: str, stored: str | None, calls: Calls) -> None:
    made = models.model(name)
    if stored:
        parco.convert_(made, stored)
    expected = steps(made)
    fusion = fuse_(made)
    assert len(fusion.fused["layer"]) == 2
    calls.clear()
    agree(steps(made), expected)
    assert calls == [1, 1, 2, 2, 2, 2]  # the first token teaches which layer follows


def low_rank(shape: tuple[int, int], format: str | None) -> Weight:
    rank = 8
    shapes = ((shape[0], rank), (rank, shape[1]))
    left, right = (Quantized(format, each) if format else Dense(each, "bf16") for each in shapes)
    return LowRank(left, right)


@pytest.mark.parametrize("kind", ["factored", "factored in int8", "corrected", "three terms"])
def test_low_rank_and_sums_decode_in_one_call_a_token(kind: str, calls: Calls) -> None:
    made = models.model("qwen2 tied")
    for group in nn.groups(made):
        for name in group.members if group.kind != "embed" else ():
            shape = tuple(nn.matrix(made, name).shape)
            spec = low_rank(shape, "int8:row" if kind == "factored in int8" else None)
            if kind == "corrected":
                spec = Sum(Quantized("int8:row", shape), spec)
            elif kind == "three terms":
                spec = Sum(Quantized("int4:16", shape), Dense(shape, "fp16"), spec)
            nn.replace_(made, name, nn.StoredWeight(spec, stored_tensors(spec)))
    nn.pack_(made)
    expected = steps(made)
    fuse_(made)
    calls.clear()
    agree(steps(made), expected)
    assert calls == [1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["qwen2 tied", "gpt2", "gpt-neox", "gemma2"])
def test_in_few_bits_it_is_no_further_from_the_truth(name: str, dtype: torch.dtype, calls: Calls) -> None:
    made = models.model(name, dtype)
    truth = steps(copy.deepcopy(made).float())
    before = sum(apart(a, b) for a, b in zip(steps(made), truth, strict=True))
    fuse_(made)
    assert sum(apart(a, b) for a, b in zip(steps(made), truth, strict=True)) < 1.1 * before
    assert calls


@pytest.mark.parametrize("packed", [True, False])
def test_joined_and_apart_are_the_same_bits(packed: bool, calls: Calls) -> None:
    """Products of q, k, v and of gate, up are one where they lie side by side."""
    from parco.nn import joined

    wide = {**models.COMMON, "hidden_size": 64, "intermediate_size": 96}
    torch.manual_seed(0)
    made = models.t.AutoModelForCausalLM.from_config(models.t.LlamaConfig(**wide)).eval()
    parco.convert_(made, "int4:32")
    if not packed:
        for module in made.modules():
            if isinstance(module, nn.StoredWeight):
                module.unpack_()
    size = sum(p.untyped_storage().nbytes() for p in made.parameters())
    fuse_(made)
    for layer in made.model.layers:
        for module, kind in ((layer, "layer"), (layer.mlp, "gate")):
            for layers in groups(module, kind):
                assert joined.joined(layers) is not None
    assert (
        sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in made.parameters()}.values()) <= size
    )
    together = steps(made)
    for parameter in made.parameters():
        parameter.data = parameter.data.clone()
    assert all(joined.joined(layers) is None for layers in groups(made.model.layers[0], "layer"))
    assert all(map(torch.equal, steps(made), together))
    assert set(calls) == {1, 2}


def test_hooks_inside_run_and_outputs_are_the_modules(calls: Calls) -> None:
    made = models.model("llama")
    fuse_(made)
    expected, seen = steps(made), []
    calls.clear()
    handle = made.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    agree(steps(made), expected)
    assert len(seen) == 6
    assert set(calls) == {1}
    handle.remove()
    scale = made.model.layers[0].register_forward_hook(lambda module, inputs, output: output.mul_(2))
    plain = steps(made)
    assert apart(plain[-1], expected[-1]) > 1e-3
    scale.remove()
    double = made.model.layers[1].register_forward_pre_hook(lambda module, inputs: inputs[0].mul_(2))
    agree(steps(made), plain)
    double.remove()
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        calls.clear()
        steps(made)
        assert not calls


def test_hidden_states_are_each_layers_own() -> None:
    made = models.model("qwen3")
    plain = copy.deepcopy(made)
    fuse_(made)
    for _ in range(2):
        agree(*(list(last(model, output_hidden_states=True).hidden_states) for model in (made, plain)))


def test_a_changed_hidden_state_is_computed_anew() -> None:
    """What is computed ahead serves only the very tensor that it was computed for."""
    made = models.model("llama")
    fuse_(made)
    steps(made)
    first, second = made.model.layers
    with torch.inference_mode():
        x = torch.randn(1, 1, 48)
        angles = made.model.rotary_emb(x, torch.tensor([[3]]))
        cache = made(TOKENS[:, :3], use_cache=True).past_key_values
        ask: dict[str, Any] = {"past_key_values": cache, "position_embeddings": angles}
        y = first(x, **ask)
        ahead = second(y, **ask)
        cache.crop(-1)
        assert torch.equal(second(first(x, **ask), **ask), ahead)
        cache.crop(-1)
        changed = second(first(x, **ask).clone() + 1, **ask)
        cache.crop(-1)
        y = first(x, **ask)
        y += 1
        assert torch.equal(second(y, **ask), changed)
        assert not torch.equal(changed, ahead)
        cache.crop(-1)
        y = first(x, **ask)
        other = first(torch.randn(1, 1, 48), past_key_values=copy.deepcopy(cache), position_embeddings=angles)
        first(torch.randn(1, 1, 48), **ask)  # writes over what was computed ahead for y
        assert torch.equal(second(y, **ask), ahead)
        assert not torch.equal(other, y)


def test_a_layer_that_is_passed_over_is_not_in_the_result() -> None:
    made = models.t.AutoModelForCausalLM.from_config(models.t.LlamaConfig(**{**models.COMMON, "num_hidden_layers": 3}))
    fuse_(made.eval())
    steps(made)
    first, second, third = made.model.layers
    with torch.inference_mode():
        x = torch.randn(1, 1, 48)
        angles = made.model.rotary_emb(x, torch.tensor([[3]]))
        cache = made(TOKENS[:, :3], use_cache=True).past_key_values
        ask: dict[str, Any] = {"past_key_values": cache, "position_embeddings": angles}
        y = first(x, **ask)
        second(y, **ask)
        skipped = third(y, **ask)
        cache.crop(-1)
        assert torch.equal(third(y.clone(), **ask), skipped)


def test_a_model_that_stops_early_is_followed(calls: Calls) -> None:
    made = models.model("llama")
    fuse_(made)
    steps(made)
    calls.clear()
    with torch.inference_mode():
        out = made(TOKENS[:, :3], use_cache=True)
        made.config.num_hidden_layers = 1
        for i in range(3, 6):
            out = made(TOKENS[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
    assert calls == [2, 1, 1]
    assert out.past_key_values.layers[1].keys.shape[2] == 3
    made.config.num_hidden_layers = 2
    calls.clear()
    steps(made)
    assert calls == [1, 1, 2, 2, 2, 2]


def test_changed_weights_are_seen(calls: Calls) -> None:
    made = models.model("llama")
    parco.convert_(made, "int4:16")
    fuse_(made)
    steps(made)
    other = models.model("llama", seed=5)
    parco.convert_(other, "int4:16")
    expected = steps(other)
    made.load_state_dict(other.state_dict())
    agree(steps(made), expected)
    made.load_state_dict(models_state(made), assign=True)
    agree(steps(made), expected)
    for change in (nn.StoredWeight.unpack_, nn.StoredWeight.pack_):
        for module in made.modules():
            if isinstance(module, nn.StoredWeight):
                change(module)
        calls.clear()
        agree(steps(made), expected)
        assert calls
    made.model.layers[1].mlp = copy.deepcopy(made.model.layers[0].mlp)
    plain = copy.deepcopy(other)
    plain.model.layers[1].mlp = copy.deepcopy(plain.model.layers[0].mlp)
    agree(steps(made), steps(plain))
    nn.replace_(made, "model.layers.0.mlp.up_proj", nn.StoredWeight.encode(nn_dense(88, 48), torch.zeros(88, 48)))
    assert apart(steps(made)[0], expected[0]) > 1e-3


@pytest.mark.parametrize("stored", ["int4:16", "int8:row"])
def test_products_are_followed_in_one_call_too(stored: str, calls: Calls) -> None:
    made = models.model("llama")
    parco.convert_(made, stored)
    plain = steps(made)
    nn.set_product_(made, "activations(int8)", lambda name: "mlp" in name or "k_proj" in name)
    expected = steps(made)
    assert not torch.equal(expected[0], plain[0])
    nn.set_product_(made, "native")
    fuse_(made)
    agree(steps(made), plain)
    for names in (("mlp", "k_proj"), ("mlp", "self_attn")):
        calls.clear()
        nn.set_product_(made, "activations(int8)", lambda name, names=names: any(part in name for part in names))
        found = steps(made)
        assert calls
        if "k_proj" in names:
            agree(found, expected, 1e-2)  # a last bit before a rounding to int8 can move a code
        assert apart(found[0], plain[0]) > 1e-4
    nn.set_product_(made, "native")
    agree(steps(made), plain)


def test_replaced_parts_and_forwards_are_asked(calls: Calls) -> None:
    made = models.model("llama")
    fuse_(made)
    steps(made)
    gate = made.model.layers[0].mlp

    class Doubled(type(gate)):
        def forward(self, x):
            return super().forward(x) * 2

    expected = steps(made)
    down = gate.down_proj.forward
    gate.down_proj.forward = lambda x: 2 * down(x)  # as those who offload do
    doubled = steps(made)
    assert apart(doubled[0], expected[0]) > 1e-3
    del gate.down_proj.forward
    calls.clear()
    agree(steps(made), expected)
    assert 2 in calls
    gate.__class__ = Doubled
    agree(steps(made), doubled)


def nn_dense(rows: int, columns: int) -> parco.weights.Dense:
    return parco.weights.Dense((rows, columns))


def models_state(made: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in made.state_dict().items()}


def test_copies_pickles_and_saving(tmp_path: Any, calls: Calls) -> None:
    made = models.model("qwen2 tied", torch.bfloat16)
    parco.convert_(made, "int4:16")
    state = models_state(made)
    fuse_(made)
    expected = steps(made)
    torch.save(made, tmp_path / "model.pt")
    for twin in (copy.deepcopy(made), torch.load(tmp_path / "model.pt", weights_only=False)):
        calls.clear()
        assert all(map(torch.equal, steps(twin), expected))
        assert 2 in calls
        assert proofs.STATE not in copy.copy(twin.model.layers[0]).__dict__
    assert all(torch.equal(made.state_dict()[name], value) for name, value in state.items())
    made.save_pretrained(tmp_path / "saved")
    loaded = models.t.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    fuse_(loaded)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in state.items())
    assert steps(made.float())[0].dtype == torch.float32


def test_the_cache_stays_what_it_is() -> None:
    """Its tensors are views with room behind them; what others do with them is undisturbed."""
    made = models.model("llama")
    plain = copy.deepcopy(made)
    fuse_(made)
    caches = DynamicCache(), DynamicCache()
    agree(steps(made, cache=caches[0]), steps(plain, cache=caches[1]))
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        assert type(ours) is type(theirs)
        assert ours.get_seq_length() == 9
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)
    kept, twin = caches[0].layers[0].keys, copy.deepcopy(caches[0])
    shallow = copy.copy(caches[0])
    shallow.layers = [copy.copy(layer) for layer in caches[0].layers]
    before = kept.clone()
    results = []
    with torch.inference_mode():
        for cache in (caches[0], twin, shallow, caches[1]):
            model = plain if cache is caches[1] else made
            token = TOKENS[:, 1:2] if cache is not twin else TOKENS[:, 2:3]
            results.append(model(token, past_key_values=cache, use_cache=True).logits)
    assert torch.equal(kept, before)
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])
    agree(results[:1], results[3:])
    agree([caches[0].layers[1].keys], [caches[1].layers[1].keys])
    for cache in caches:
        cache.crop(-3)
    agree(steps(made, cache=caches[0], start=2), steps(plain, cache=caches[1], start=2))


def test_a_long_text_outgrows_its_room_and_a_window_fills() -> None:
    config = models.t.MistralConfig(**{**models.COMMON, "max_position_embeddings": 256}, sliding_window=90)
    torch.manual_seed(1)
    made = models.t.AutoModelForCausalLM.from_config(config).eval()
    plain = copy.deepcopy(made)
    fuse_(made)
    found = [model.generate(TOKENS, max_new_tokens=120, min_new_tokens=120, do_sample=False) for model in (made, plain)]
    assert torch.equal(*found)


def test_what_is_not_one_plain_token_takes_the_modules(calls: Calls) -> None:
    made = models.model("llama")
    plain = copy.deepcopy(made)
    fuse_(made)
    calls.clear()
    many = TOKENS[:, :6].view(2, 3)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with torch.inference_mode():
        for model in (made, plain):
            out = model(many, use_cache=True)
            model(many[:, :1], past_key_values=out.past_key_values)  # two sequences
            model(many[:, :1])  # no cache
    results = [model.generate(many, attention_mask=mask, max_new_tokens=4, do_sample=False) for model in (made, plain)]
    assert torch.equal(*results)
    made.train()
    out = made(TOKENS[:, :1], use_cache=True)
    made(TOKENS[:, :1], past_key_values=out.past_key_values).logits.sum().backward()
    assert made.model.layers[0].mlp.up_proj.weight.grad.any()
    made.eval()
    results = [model.generate(TOKENS[:, :3], num_beams=2, max_new_tokens=4, do_sample=False) for model in (made, plain)]
    assert torch.equal(*results)
    assert not calls


def test_the_compiler_traces_the_modules(calls: Calls) -> None:
    made = models.model("llama")
    fuse_(made)
    expected = steps(made)
    torch._dynamo.reset()
    compiled = torch.compile(made, backend="eager")
    calls.clear()
    agree(steps(compiled, 2), expected[:2])
    assert not calls


def test_every_instruction_set(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    from tests.laws.kernel_laws import each_isa

    made = models.model("llama")
    parco.convert_(made, "int4:16")
    expected = steps(made)
    fuse_(made)
    for isa in each_isa(monkeypatch):
        calls.clear()
        agree(steps(made), expected)
        assert calls
        assert {layer.__dict__[proofs.STATE].prepared.isa for layer in made.model.layers} == {isa}


def test_layers_that_compute_something_else_are_left() -> None:
    made = models.model("llama")
    kind = type(made.model.layers[0])

    class Shifted(kind):
        def forward(self, hidden_states, **kwargs):
            residual = hidden_states
            hidden_states, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden_states = residual - hidden_states
            return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    made.model.layers[1].__class__ = Shifted
    granite = models.t.AutoModelForCausalLM.from_config(
        models.t.GraniteConfig(**models.COMMON, residual_multiplier=0.5)
    )
    fusion = fuse_(made)
    assert fusion.fused["layer"] == ("model.layers.0",)
    assert "something else than its parts" in fusion.left["model.layers.1"]
    assert "layer" not in fuse_(granite.eval()).fused
