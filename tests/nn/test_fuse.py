"""fuse_: what is fused computes the same within rounding, is closer to the truth in bf16, and what differs is left."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from tests.nn import models
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import parco
from parco import machine, nn
from parco.kernels.linear import linear_dense
from parco.nn import attention, fuse_

FUSED = {
    "llama": {"norm": 5, "gate": 2, "rotation": 2, "layer": 2},
    "llama odd": {"norm": 5, "gate": 2, "rotation": 2, "layer": 2},
    "mistral": {"norm": 5, "gate": 2, "rotation": 2, "layer": 2},
    "qwen2 tied": {"norm": 5, "gate": 2, "rotation": 2, "layer": 2},
    "qwen3": {"norm": 9, "gate": 2, "rotation": 2, "layer": 2},
    "gpt2": {"attention": 2, "dense": 8, "activation": 2, "dropout": 7, "layer": 2},
    "gpt-neox": {"rotation": 2, "layer": 2},
    "gemma": {"norm": 5, "gate": 2, "rotation": 2, "layer": 2},
    "gemma2": {"norm": 9, "gate": 2, "rotation": 2, "layer": 2},
    "gemma3": {"norm": 13, "gate": 2, "rotation": 2, "layer": 2},
    "phi": {"rotation": 2, "activation": 2, "layer": 2},
    "phi3": {"norm": 5, "gate": 2, "rotation": 2, "layer": 2},
    "mixtral": {"norm": 5, "experts": 2, "rotation": 2, "layer": 2},
    "qwen2-moe": {"norm": 5, "gate": 2, "experts": 1, "rotation": 2, "layer": 2},
    "opt": {"attention": 2},
}


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("name", FUSED)
def test_every_architecture_computes_the_same(name: str) -> None:
    made = models.model(name)
    expected, state = models.logits(made), made.state_dict()
    fusion = fuse_(made)
    assert {kind: len(names) for kind, names in fusion.fused.items()} == FUSED[name]
    assert not fusion.left
    assert apart(models.logits(made), expected) < 2e-6
    assert list(made.state_dict()) == list(state)
    again = fuse_(made)
    assert not again.fused


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt-neox", "phi"])
def test_in_bf16_it_is_no_further_from_the_truth(name: str) -> None:
    made = models.model(name, torch.bfloat16)
    truth = models.logits(copy.deepcopy(made).float())
    before = apart(models.logits(made), truth)
    fuse_(made)
    assert apart(models.logits(made), truth) < 1.1 * before


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_stored_weights_and_a_cache(name: str) -> None:
    made = models.model(name, torch.bfloat16)
    parco.convert_(made, "int8:row")
    plain = copy.deepcopy(made)
    fuse_(made)
    tokens = models.tokens(1, 6)
    with torch.inference_mode():
        first, second = (each(tokens, use_cache=True) for each in (made, plain))
        for _ in range(3):
            step = tokens[:, :1]
            first = made(step, past_key_values=first.past_key_values, use_cache=True)
            second = plain(step, past_key_values=second.past_key_values, use_cache=True)
            assert apart(first.logits, second.logits) < 0.05
    generated = [each.generate(tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False) for each in (made, plain)]
    assert generated[0].shape == generated[1].shape == (1, 11)


def test_gradients_are_the_unfused_ones() -> None:
    made = models.model("qwen3").train()
    fused = copy.deepcopy(made)
    fuse_(fused)
    for model in (made, fused):
        model(models.tokens(), labels=models.tokens()).loss.backward()
    for (name, a), b in zip(made.named_parameters(), fused.parameters(), strict=True):
        assert apart(b.grad, a.grad) < 1e-4, name


def test_copies_dtypes_and_the_compiler() -> None:
    made = models.model("llama")
    fuse_(made)
    expected = models.logits(made)
    copied = copy.deepcopy(made)
    torch.nn.init.zeros_(made.model.norm.weight)
    assert torch.equal(models.logits(copied), expected)  # its modules, not those copied from
    assert apart(models.logits(copied.double()), expected) < 1e-5
    assert models.logits(copied.bfloat16()).dtype == torch.bfloat16
    compiled = torch.compile(copied.float(), backend="eager", fullgraph=True)
    with torch.no_grad():
        assert apart(compiled(models.tokens()).logits, expected) < 0.05  # it has been through bf16


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_fused_while_it_trains_can_be_copied(name: str) -> None:
    made = models.model(name).train()
    assert fuse_(made).left  # its layers decode by their modules
    tokens = models.tokens()
    copied = pickle.loads(pickle.dumps(copy.deepcopy(made)))
    assert torch.equal(copied.eval()(tokens).logits, made.eval()(tokens).logits)


class PlainRMSNorm(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(16))
        self.eps = 1e-3

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class OutsideRMSNorm(PlainRMSNorm):
    def forward(self, x):
        return self.weight * (x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps))


class BiasedRMSNorm(PlainRMSNorm):
    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(16))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)) + self.bias


class GatedRMSNorm(PlainRMSNorm):
    def forward(self, x, gate=None):
        x = x if gate is None else x * gate
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class PlainGate(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (torch.nn.Linear(16, 16) for _ in range(3))
        self.act_fn = torch.nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ShiftedGate(PlainGate):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1))


class ClampedGate(PlainGate):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=10.0)) * self.up_proj(x))


class DroppedGate(PlainGate):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class ScaledGate(PlainGate):
    scale = 1.0

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * self.scale


def zeroed() -> torch.nn.Module:
    made = ShiftedGate()
    torch.nn.init.zeros_(made.down_proj.weight)
    torch.nn.init.zeros_(made.down_proj.bias)
    return made


def soft() -> torch.nn.Module:
    made = PlainGate()
    made.act_fn = torch.nn.Softplus()
    return made


def test_what_computes_something_else_is_left_and_named() -> None:
    others = {
        "outside": OutsideRMSNorm(), "biased": BiasedRMSNorm(), "gated": GatedRMSNorm(), "shifted": ShiftedGate(),
        "clamped": ClampedGate().eval(), "dropped": DroppedGate().eval(), "scaled": ScaledGate(), "zeroed": zeroed(),
        "soft": soft(),
    }  # fmt: skip
    made = torch.nn.ModuleDict({**others, "norm": PlainRMSNorm(), "gate": PlainGate()})
    fusion = fuse_(made)
    assert fusion.fused == {"norm": ("norm",), "gate": ("gate",), "dropout": ("dropped.dropout",)}
    assert set(fusion.left) == set(others)
    assert "none of silu" in fusion.left["soft"]
    assert "clamp" in fusion.left["clamped"]
    assert "dropout" in fusion.left["dropped"]
    assert "more than one input" in fusion.left["gated"]
    assert "soft: its activation" in str(fusion)
    x = torch.randn(3, 16)
    assert torch.equal(made["norm"](x=x), made["norm"](x))


def test_hooks_and_replaced_forwards_are_not_asked() -> None:
    made = torch.nn.ModuleDict({"norm": PlainRMSNorm(), "other": PlainRMSNorm()})

    def refuse(*_: object) -> None:
        raise AssertionError("a hook of the user's ran")

    made["norm"].register_forward_hook(refuse)
    made["other"].forward = lambda x: x  # as those who offload do
    fusion = fuse_(made)
    assert fusion.fused == {"norm": ("norm",)}
    assert "replaced" in fusion.left["other"]


def test_copies_and_pickles_stand_alone(tmp_path) -> None:
    made = models.model("llama")
    fuse_(made)
    expected = models.logits(made)
    torch.save(made, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(models.logits(loaded), expected)
    assert type(loaded.model.norm).__name__ == "LlamaRMSNorm"
    assert isinstance(loaded.model.norm, type(models.model("llama").model.norm))
    assert not fuse_(loaded).fused
    norm = made.model.norm
    shallow = copy.copy(norm)
    shallow._parameters = {"weight": torch.nn.Parameter(torch.zeros(48))}
    assert not shallow(torch.randn(2, 48)).any()


def test_under_transforms_of_torch_func_the_unfused_forward_runs() -> None:
    made = models.model("llama")
    plain = copy.deepcopy(made)
    fuse_(made)

    def loss(model):
        def of(parameters):
            return torch.func.functional_call(model, parameters, (models.tokens(),)).logits.square().mean()

        return torch.func.grad(of)(dict(model.named_parameters()))

    expected = loss(plain)
    for name, gradient in loss(made).items():
        assert apart(gradient.detach(), expected[name].detach()) < 1e-4, name


def test_angles_that_train_keep_their_gradient() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from parco.nn.proofs import rotary

    q, cos = torch.randn(1, 2, 3, 8), torch.randn(1, 3, 8, requires_grad=True)
    rotary(apply_rotary_pos_emb)(q, q, cos, cos)[0].sum().backward()
    assert cos.grad is not None
    assert cos.grad.any()


def test_other_rotations_are_left() -> None:
    made = t.AutoModelForCausalLM.from_config(t.CohereConfig(**models.COMMON)).eval()  # pairs neighbours, not halves
    expected = models.logits(made)
    fusion = fuse_(made)
    assert "rotation" not in fusion.fused
    assert any("turns otherwise" in reason for reason in fusion.left.values())
    assert apart(models.logits(made), expected) < 2e-6


def test_a_model_is_needed() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        fuse_("llama")  # type: ignore[arg-type]
    assert str(fuse_(torch.nn.Linear(2, 2))) == "nothing to fuse"
    assert isinstance(
        parco.fuse_(nn.Linear(nn.StoredWeight.encode(parco.weights.Dense((2, 2)), torch.eye(2)))), nn.Fusion
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_layers_in_half_precision_sum_in_fp32(dtype: torch.dtype) -> None:
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
    model = torch.nn.Sequential(torch.nn.Linear(300, 20), torch.nn.Linear(20, 5, bias=False)).to(dtype)
    state = model.state_dict()
    assert fuse_(model).fused == {"dense": ("0", "1")}
    first = model[0]
    with torch.no_grad():
        assert torch.equal(first(x), linear_dense(x, first.weight, first.bias))
        assert apart(first(x), x.double() @ first.weight.double().T + first.bias.double()) < torch.finfo(dtype).eps
    assert list(model.state_dict()) == list(state)
    assert type(copy.deepcopy(model)[0]) is type(first)
    assert isinstance(first, torch.nn.Linear)
    assert type(first).__name__ == "Linear"


def test_a_dense_layer_trains_as_before() -> None:
    x = torch.randn(2, 64).bfloat16()
    plain = torch.nn.Linear(64, 8).bfloat16()
    fused = torch.nn.Sequential(copy.deepcopy(plain))
    fuse_(fused)
    y = fused(x)
    assert torch.equal(y, plain(x))
    y.float().sum().backward()
    plain(x).float().sum().backward()
    assert torch.equal(fused[0].weight.grad, plain.weight.grad)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fused(x.float()).dtype == torch.bfloat16
    with torch.no_grad():
        assert fused.float()(x.float()).dtype == torch.float32


def test_a_fused_dense_layer_is_still_a_site() -> None:
    made = models.model("llama", torch.bfloat16)
    fuse_(made)
    before = set(nn.linears(made))
    assert before == set(nn.linears(models.model("llama", torch.bfloat16)))
    parco.convert_(made, "int4:32")
    assert not any(type(each) is torch.nn.Linear for each in made.model.layers.modules())


OTHERS = {
    "bert": lambda: t.BertModel(
        t.BertConfig(vocab_size=99, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    ),
    "t5": lambda: t.T5Model(t.T5Config(vocab_size=99, d_model=48, d_kv=12, d_ff=64, num_layers=2, num_heads=4)),
    "bart": lambda: t.BartModel(
        t.BartConfig(
            vocab_size=99, d_model=48, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_encoders_attend_as_before(name: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_is_faster", lambda dtype, half, drops: True)
    torch.manual_seed(0)
    made = OTHERS[name]().eval()
    tokens = torch.randint(3, 99, (2, 20))
    mask = torch.ones_like(tokens)
    mask[0, 15:] = 0
    given = {"input_ids": tokens} | ({"attention_mask": mask} if padded else {})
    given |= {} if name == "bert" else {"decoder_input_ids": tokens[:, :7]}
    expected = made(**given).last_hidden_state
    assert fuse_(made).fused["attention"]
    assert apart(made(**given).last_hidden_state, expected) < 2e-6


def attentions(model: torch.nn.Module, **given: object) -> list[str]:
    """The operations of attention that a forward and its backward run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(**given).logits.sum().backward()
    return sorted(
        {
            event.name
            for event in profile.events()
            if "attention" in event.name and event.name.startswith(("aten::", "parco::"))
        }
    )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_attention_in_tiles_is_what_trains(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_is_faster", lambda dtype, half, drops: half)
    made = models.model(name, torch.float32)
    plain = models.model(name, torch.float32)
    fuse_(made)
    tokens = models.tokens()
    tiled = ["parco::attention", "parco::attention_backward"]
    assert attentions(made, input_ids=tokens) == tiled
    padding = torch.ones_like(tokens)
    padding[0, :3] = 0
    packed = torch.arange(tokens.shape[1]) % 7
    for given in ({"attention_mask": padding}, {"position_ids": packed.expand(tokens.shape)}):
        assert attentions(made, input_ids=tokens, **given) == tiled
        ours, theirs = (model(input_ids=tokens, **given).logits for model in (made, plain))
        seen = padding.bool() if "attention_mask" in given else torch.ones_like(padding, dtype=torch.bool)
        assert apart(ours[seen], theirs[seen]) < 2e-6
    made.config._attn_implementation = "eager"
    assert not attentions(made, input_ids=tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fused_model_is_traced_with_masks(dtype: torch.dtype) -> None:
    """Numbers that a mask would be asked for are not there."""
    made = models.model("llama", dtype)
    fuse_(made)
    tokens = models.tokens()
    with FakeTensorMode(allow_non_fake_inputs=True):
        padding = torch.ones(tokens.shape, dtype=torch.int64)
        assert (
            made(input_ids=torch.zeros(tokens.shape, dtype=torch.int64), attention_mask=padding).logits.dtype == dtype
        )


def test_dropout_of_attention_trains_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_is_faster", lambda dtype, half, drops: half)
    config = t.GPT2Config(
        vocab_size=99, n_embd=48, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0
    )
    torch.manual_seed(0)
    made = t.GPT2LMHeadModel(config)
    tokens = torch.randint(0, 99, (2, 40))
    fuse_(made)
    whole = made.eval()(tokens).logits
    assert attentions(made.train(), input_ids=tokens) == ["parco::attention", "parco::attention_backward"]
    found = []
    for seed in (1, 1, *range(2, 42)):
        torch.manual_seed(seed)
        found.append(made(tokens).logits.detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
    # The first query has one key, so half of its draws are 0; the mean of many comes near to what there is without.
    each, mean = apart(found[1], whole), apart(torch.stack(found).mean(0), whole)
    assert 0.01 < mean < each / 2


def dropping() -> torch.nn.Module:
    torch.manual_seed(0)
    config = {"vocab_size": 101, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return t.GPT2LMHeadModel(t.GPT2Config(**config, attn_pdrop=0.0, resid_pdrop=0.1, embd_pdrop=0.1))


def operations(run: Callable[[], object]) -> set[str]:
    """The operations of dropout that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    names = {event.name for event in profile.events()}
    return {name for name in names if "dropout" in name and name.startswith(("aten::", "parco::"))}


def test_dropouts_train_without_a_mask() -> None:
    made, plain = dropping(), dropping()
    fusion = fuse_(made)
    assert len(fusion.fused["dropout"]) == 5  # of embeddings, attention and feed-forward blocks; p of attention is 0
    assert "dropout       5" in str(fusion)
    assert list(made.state_dict()) == list(plain.state_dict())
    tokens = torch.randint(0, 99, (2, 40))
    whole = plain.eval()(tokens).logits
    assert apart(made.eval()(tokens).logits, whole) < 2e-6
    made.train()
    assert operations(lambda: made(tokens).logits.sum().backward()) == {"parco::dropout"}
    found, theirs = [], []
    for seed in (1, 1, *range(2, 42)):
        torch.manual_seed(seed)
        found.append(made(tokens).logits.detach())
        theirs.append(plain.train()(tokens).logits.detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
    # As far from what there is without as PyTorch's dropout brings it, each and the mean of many.
    assert 0.8 < apart(found[1], whole) / apart(theirs[1], whole) < 1.25
    means = [apart(torch.stack(each).mean(0), whole) for each in (found, theirs)]
    assert 0.8 < means[0] / means[1] < 1.25


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_drop_the_same_again(reentrant: bool) -> None:
    made, tokens, gradients = dropping().train(), models.tokens(), []
    assert fuse_(made).fused["dropout"]
    for checkpointed in (False, True):
        if checkpointed:
            made.gradient_checkpointing_enable({"use_reentrant": reentrant})
        made.zero_grad()
        torch.manual_seed(3)
        made(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in made.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_copies_and_pickles_of_dropouts() -> None:
    made = torch.nn.Sequential(torch.nn.Dropout(0.3))
    fuse_(made)
    x, results = torch.ones(40, 50), []
    for each in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(each[0]).__name__ == "Dropout" and isinstance(each[0], torch.nn.Dropout)
        assert not fuse_(each).fused
        torch.manual_seed(5)
        results.append(each(x))
        assert operations(lambda each=each: each(x)) == {"parco::dropout"}
        assert torch.equal(each.eval()(x), x)
    assert all(torch.equal(each, results[0]) for each in results[1:])


class MyDropout(torch.nn.Dropout):
    pass


def test_dropouts_that_are_left() -> None:
    kinds = {"none": torch.nn.Dropout(0.0), "own": MyDropout(0.5), "inside": torch.nn.Dropout(0.5, inplace=True)}
    made = torch.nn.ModuleDict({**kinds, "fused": torch.nn.Dropout(0.5), "replaced": torch.nn.Dropout(0.5)})
    made["replaced"].forward = lambda x: x
    fusion = fuse_(made)
    assert fusion.fused == {"dropout": ("fused",)}
    assert set(fusion.left) == {"inside", "replaced"}
    fused, plain, x = made["fused"], torch.nn.Dropout(0.5), torch.ones(30, 40)

    def same(run: Callable[[torch.nn.Module], torch.Tensor]) -> bool:
        results = []
        for each in (fused, plain):
            torch.manual_seed(2)
            results.append(run(each))
        return torch.equal(*results)

    assert not same(lambda dropout: dropout(x))
    assert same(lambda dropout: dropout(x.double()))
    turned = x.reshape(2, 15, 40).transpose(1, 2)
    assert same(lambda dropout: dropout(turned).transpose(1, 2).view(30, 40))  # as x lies
    assert same(lambda dropout: torch.nested.to_padded_tensor(dropout(torch.nested.nested_tensor([x, x])), 0.0))
    assert same(lambda dropout: torch.func.vmap(dropout, randomness="different")(x))
    assert same(lambda dropout: torch.compile(dropout, backend="eager", fullgraph=True)(x))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        assert same(lambda dropout: forward_ad.unpack_dual(dropout(dual)).tangent)
    assert same(lambda dropout: dropout.eval()(x))
    fused.train().p = 0.0
    assert torch.equal(fused(x), x)
    fused.p, fused.inplace = 0.5, True
    assert fused(x) is x
    made["none"].p = 0.5
    assert fuse_(made).fused == {"dropout": ("none",)}


@pytest.mark.parametrize(
    ("isa", "taken"),
    [
        ("generic", set()),
        ("avx2", {(torch.bfloat16, True), (torch.bfloat16, False)}),
        ("avx512", {(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)}),
        ("avx512_vbmi", {(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)}),
        ("amx", {(torch.float32, True)}),
    ],
)
def test_attention_in_tiles_where_it_is_faster(
    isa: str, taken: set[tuple[torch.dtype, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "isa", lambda: isa)
    kinds = [(dtype, causal) for dtype in (torch.float32, torch.bfloat16) for causal in (True, False)]
    x = {dtype: torch.zeros(1, 2, 40, 16, dtype=dtype) for dtype, _ in kinds}
    assert {(d, c) for d, c in kinds if attention._takes(x[d], x[d], x[d], c)} == taken
    for queries, tokens, enough in ((31, 40, False), (32, 40, True), (5, 5, True)):
        q, keys = x[torch.bfloat16][:, :, :queries], x[torch.bfloat16][:, :, :tokens]
        assert attention._takes(q, keys, keys, False) == (enough and (torch.bfloat16, False) in taken)
    wide = x[torch.float32]
    assert attention._takes(wide, wide, wide, False, None, True) == (isa != "generic")
    half = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    for dtype, own in x.items():
        assert attention._takes(own, own, own, False, half) == ((dtype, True) in taken)
        assert attention._takes(own, own, own, False, torch.ones_like(half)) == ((dtype, False) in taken)
        for other in (half.float(), half[0], half[..., :39], half.to("meta")):
            assert not attention._takes(own, own, own, False, other)


def test_an_attention_function_of_the_users_own_is_left() -> None:
    known = t.AttentionInterface._global_mapping["sdpa"]
    made = models.model("gpt2")

    def colder(module, query, key, value, mask, temperature=1.0, **others):
        return known(module, query / temperature, key, value, mask, **others)

    t.AttentionInterface.register("sdpa", colder)
    try:
        expected = made(models.tokens(), temperature=3.0).logits
        assert "attention" not in fuse_(made).fused
        assert apart(made(models.tokens(), temperature=3.0).logits, expected) < 2e-6
    finally:
        t.AttentionInterface.register("sdpa", known)


@pytest.fixture
def sunk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every call of attention with sinks that was not the model's own: how many queries it had."""
    found: list[int] = []
    own = attention._sunk

    def counted(q: torch.Tensor, *arguments: Any) -> Any:
        y = own(q, *arguments)
        if y is not None:
            found.append(q.shape[2])
        return y

    monkeypatch.setattr(attention, "_sunk", counted)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_with_sinks(dtype: torch.dtype, sunk: list[int]) -> None:
    """gpt-oss: prompts and tokens, beyond the window of every other layer, and padded sequences."""
    made = models.model("gpt-oss", dtype)
    parco.convert_(made, "bf16" if dtype == torch.bfloat16 else "fp32")
    plain = copy.deepcopy(made)
    fusion = fuse_(made)
    assert {kind: len(names) for kind, names in fusion.fused.items() if kind != "dense"} == {
        "norm": 5, "rotation": 2, "experts": 2,
    }  # fmt: skip
    assert not fusion.left
    close = 3e-6 if dtype == torch.float32 else 0.03
    tokens = models.tokens(2, 9)
    models.logits(made)  # which tries out the model's own function
    sunk.clear()
    padded = torch.ones_like(tokens)
    padded[1, :3] = 0
    with torch.inference_mode():
        for mask in (None, padded):
            first, second = (each(tokens, attention_mask=mask, use_cache=True) for each in (made, plain))
            seen = slice(None) if mask is None else mask.bool()
            assert apart(first.logits[seen], second.logits[seen]) < close
            assert sunk == [9, 9]
            sunk.clear()
        first, second = (each(tokens, use_cache=True) for each in (made, plain))
        for _ in range(3):
            first, second = (
                each(tokens[:, :1], past_key_values=last.past_key_values, use_cache=True)
                for each, last in ((made, first), (plain, second))
            )
            assert apart(first.logits, second.logits) < close
        assert sunk == [9, 9, *[1, 1] * 3]
        sunk.clear()
        weights = made(tokens, output_attentions=True).attentions
        assert [each.shape for each in weights] == [(2, 4, 9, 9)] * 2
    assert not sunk


def test_sinks_that_train_are_the_models_own(sunk: list[int]) -> None:
    made = models.model("gpt-oss")
    fused = copy.deepcopy(made)
    fuse_(fused)
    sunk.clear()
    for model in (made, fused):
        model(models.tokens(), labels=models.tokens()).loss.backward()
    for (name, a), b in zip(made.named_parameters(), fused.named_parameters(), strict=True):
        assert apart(b[1].grad, a.grad) < 1e-4, name
    assert not sunk
