"""Every architecture keeps its logits when its matrices are swapped for stored Weights of the same numbers."""

import copy

import pytest
import torch
from tests.nn.models import CONFIGS, TIED, logits, model, tokens

from parco import nn
from parco.nn import Embedding, Experts, Linear, StoredWeight
from parco.weights import Dense, LowRank, Quantized


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


def replace_all(made, spec_of, *, kinds=None):
    """Encodes every matrix, each group member once, and puts what is stored in its place."""
    for group in nn.groups(made):
        if kinds is not None and group.kind not in kinds:
            continue
        for member in group.members[:1] if group.kind == "embed" else group.members:
            matrix = nn.matrix(made, member)
            nn.replace_(made, member, StoredWeight.encode(spec_of(tuple(matrix.shape)), matrix))
    return made


def with_dense_copies(made, stored):
    """`made` with the matrices that `stored` stands for written into its own parameters."""
    for group in nn.groups(stored):
        for member in group.members:
            where, matrix = nn.site(made, member), nn.matrix(stored, member)
            if "gate_up_proj[" in member and not where.module.is_concatenated:  # rows of gate and up alternate
                columns = where.module.gate_up_proj[where.expert[1]].detach()
                columns[:, ::2], columns[:, 1::2] = (half.T for half in matrix.chunk(2))
            else:
                nn.matrix(made, member).copy_(matrix)
    return made


def test_dense_weights_leave_the_logits_as_they_were(name):
    """The same products over the same numbers; a kernel may add up in another order, which costs fp32 units."""
    made = model(name)
    expected = logits(made)
    replace_all(made, lambda shape: Dense(shape, "fp32"))
    assert all(isinstance(where.module, Linear | Experts) for where in nn.linears(made).values())
    torch.testing.assert_close(logits(made), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("form", ["int8:row", "int4:32"])
def test_quantized_weights_equal_their_dense_meaning(name, form):
    stored = replace_all(model(name), lambda shape: Quantized(form, shape))
    expected = logits(with_dense_copies(model(name), stored))
    assert not torch.allclose(expected, logits(model(name)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits(stored), expected, rtol=2e-4, atol=2e-4)


def test_groups_and_shapes_are_the_same_afterwards(name):
    made = model(name)
    before = nn.groups(made), {path: (where.shape) for path, where in nn.linears(made).items()}
    replace_all(made, lambda shape: Quantized("int8:row", shape))
    assert (nn.groups(made), {path: where.shape for path, where in nn.linears(made).items()}) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_compute_dtype_of_the_model_is_kept(dtype):
    made = replace_all(model("gemma", dtype), lambda shape: Quantized("int8:row", shape))
    assert {m.dtype for m in made.modules() if isinstance(m, StoredWeight)} == {dtype}
    assert logits(made).dtype == dtype
    assert logits(made.float()).dtype == torch.float32


@pytest.mark.parametrize("name", sorted(TIED))
@pytest.mark.parametrize("through", ["embedding", "head"])
def test_tied_stays_tied(name, through):
    made = model(name)
    embedding, head = nn.embedding_name(made), nn.head_name(made)
    member = embedding if through == "embedding" else head
    matrix = nn.matrix(made, member)
    nn.replace_(made, member, StoredWeight.encode(Quantized("int4:32", tuple(matrix.shape)), matrix))
    assert made.get_submodule(embedding).weight is made.get_submodule(head).weight
    assert isinstance(made.get_input_embeddings(), Embedding)
    expected = logits(made)
    made.tie_weights()
    made.tie_weights(recompute_mapping=False)
    assert made.get_submodule(embedding).weight.codes is made.get_submodule(head).weight.codes
    assert torch.equal(logits(made), expected)
    copied = copy.deepcopy(made)
    assert copied.get_submodule(embedding).weight is copied.get_submodule(head).weight
    for parameter in ("codes", "scale"):
        assert made.all_tied_weights_keys[f"{head}.weight.{parameter}"] == f"{embedding}.weight.{parameter}"


def test_a_tied_matrix_is_saved_once(tmp_path):
    from safetensors import safe_open

    made = replace_all(model("llama tied"), lambda shape: Quantized("int4:32", shape))
    made.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"model.embed_tokens.weight.codes", "model.embed_tokens.weight.scale"} <= names
    assert not any(name.startswith("lm_head") for name in names)


def test_a_tie_declared_on_the_meta_device_is_kept():
    import transformers

    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama tied"]())
    made.lm_head.weight = torch.nn.Parameter(
        torch.empty(101, 48, device="meta")
    )  # as while loading: declared, not done yet
    nn.replace_(made, "model.embed_tokens", StoredWeight.empty(Quantized("int4:32", (101, 48)), device="meta"))
    assert made.lm_head.weight is made.model.embed_tokens.weight


def test_untied_head_and_embedding_are_apart():
    made = model("llama")
    nn.replace_(made, "lm_head", StoredWeight.encode(Dense((101, 48)), nn.matrix(made, "lm_head")))
    assert isinstance(made.model.embed_tokens, torch.nn.Embedding)
    assert made.lm_head.weight.spec == Dense((101, 48))


def test_biases_stay_the_same_parameters():
    made = model("phi")
    bias = made.lm_head.bias
    replace_all(made, lambda shape: Quantized("int8:row", shape))
    assert made.lm_head.bias is bias
    assert made.model.layers[0].mlp.fc1.bias is not None


def test_experts_one_by_one():
    """One expert's matrix can be replaced alone; the others then stay dense and the block computes the same."""
    made = model("qwen3-moe")
    expected = logits(made)
    site = "model.layers.0.mlp.experts.down_proj[2]"
    matrix = nn.matrix(made, site)
    nn.replace_(made, site, StoredWeight.encode(Dense(tuple(matrix.shape), "fp32"), matrix))
    torch.testing.assert_close(logits(made), expected, rtol=2e-5, atol=2e-5)
    nn.replace_(made, site, StoredWeight.encode(Quantized("int4:32", tuple(matrix.shape)), matrix))
    experts = made.model.layers[0].mlp.experts
    assert [str(w.spec).partition("(")[0] for w in experts.down_proj] == [
        "dense",
        "dense",
        "quantized",
        "dense",
        "dense",
    ]
    assert isinstance(made.model.layers[1].mlp.experts.down_proj, torch.nn.Parameter)
    assert f"{site[:-3]}.2.codes" in made.state_dict()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_equal_transformers(implementation):
    made = model("mixtral")
    reference = made.model.layers[0].mlp.experts
    reference.config._experts_implementation = implementation
    x, index = torch.randn(7, 48), torch.tensor([[0, 3], [3, 1], [0, 1], [4, 3], [1, 0], [3, 0], [4, 0]])
    weights = torch.rand(7, 2)
    expected = reference(x, index, weights)
    replace_all(made, lambda shape: Dense(shape, "fp32"), kinds={"experts_gate_up", "experts_down"})
    experts = made.model.layers[0].mlp.experts
    assert isinstance(experts, Experts)
    torch.testing.assert_close(experts(x, index, weights), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_of_gpt_oss_cut_gate_and_up_and_add_their_biases(implementation):
    """Inputs so large that both limits are met."""
    made = model("gpt-oss")
    reference = made.model.layers[0].mlp.experts
    reference.config._experts_implementation = implementation
    x, index = 30 * torch.randn(7, 48), torch.tensor([[0, 3], [3, 1], [0, 1], [4, 3], [1, 0], [3, 0], [4, 0]])
    weights = torch.rand(7, 2)
    gate_up = torch.cat([x @ reference.gate_up_proj[3] + reference.gate_up_proj_bias[3]])
    assert gate_up[:, ::2].max() > 7
    assert gate_up[:, 1::2].min() < -7
    expected = reference(x, index, weights)
    replace_all(made, lambda shape: Dense(shape, "fp32"), kinds={"experts_gate_up", "experts_down"})
    experts = made.model.layers[0].mlp.experts
    assert isinstance(experts, Experts)
    assert torch.equal(experts.gate_up_proj_bias[3][:88], reference.gate_up_proj_bias[3][::2])
    torch.testing.assert_close(experts(x, index, weights), expected, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("change", ["gate", "norm", "activation"])
def test_experts_that_compute_otherwise_are_no_sites(change, monkeypatch):
    made = model("gpt-oss")
    experts = made.model.layers[0].mlp.experts
    assert nn.site(made, "model.layers.0.mlp.experts.down_proj[0]").kind == "expert"
    if change == "gate":
        monkeypatch.setattr(type(experts), "_apply_gate", lambda self, both: both[..., ::2] * both[..., 1::2])
    elif change == "norm":
        experts.has_post_expert_norm = True
    else:
        experts.act_fn = torch.sin
    assert not [name for name in nn.linears(made) if name.startswith("model.layers.0.mlp.experts")]


def test_experts_held_elsewhere_add_nothing_and_no_tokens_are_fine():
    made = replace_all(model("mixtral"), lambda shape: Dense(shape, "fp32"))
    experts = made.model.layers[0].mlp.experts
    x, weights = torch.randn(3, 48), torch.ones(3, 2)
    both = experts(x, torch.tensor([[1, 5], [2, 5], [5, 5]]), weights)
    torch.testing.assert_close(both[:2], experts(x[:2], torch.tensor([[1], [2]]), weights[:2, :1]))
    assert both[2].abs().sum() == 0
    assert experts(x[:0], torch.zeros(0, 2, dtype=torch.long), weights[:0]).shape == (0, 48)


def test_experts_pass_gradients():
    made = replace_all(model("mixtral"), lambda shape: Quantized("int8:row", shape))
    experts = made.model.layers[0].mlp.experts
    x = torch.randn(3, 48, requires_grad=True)
    weights = torch.rand(3, 2, requires_grad=True)
    experts(x, torch.tensor([[1, 4], [2, 0], [3, 2]]), weights).sum().backward()
    assert x.grad.abs().min() > 0
    assert weights.grad.abs().min() > 0


def test_generates_and_compiles():
    made = replace_all(model("llama tied"), lambda shape: Quantized("int4:32", shape))
    text = made.generate(tokens(1), max_new_tokens=5, do_sample=False)
    assert text.shape == (1, 14)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(made, backend="eager", fullgraph=True)(tokens(), use_cache=False).logits
    torch.testing.assert_close(compiled, logits(made))


def test_trains_through_a_replaced_model():
    """Low-rank factors kept dense receive gradients from the loss through layers that do not train."""
    made = replace_all(model("llama"), lambda shape: Quantized("int8:row", shape))
    factors = LowRank(Dense((48, 4)), Dense((4, 88)))
    tensors = tuple(torch.randn(part.shape) / 8 for part in factors.parts().values())
    stored = StoredWeight(factors, tensors)
    stored.requires_grad_(True)
    nn.replace_(made, "model.layers.0.mlp.down_proj", stored)
    made(tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in stored.parameters())


def test_training_mode_is_kept():
    made = model("llama").train()
    replace_all(made, lambda shape: Dense(shape))
    assert made.lm_head.training
    assert made.lm_head.weight.training


def test_a_wrong_shape_is_refused():
    made = model("gpt2")
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn\.c_attn is 144x48; .*48x144"):
        nn.replace_(made, "transformer.h.0.attn.c_attn", StoredWeight.empty(Dense((48, 144))))


def test_subclasses_with_their_own_forward_are_left_alone():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    made = torch.nn.ModuleDict({"plain": torch.nn.Linear(4, 4), "doubled": Doubled(4, 4)})
    assert list(nn.linears(made)) == ["plain"]
    with pytest.raises(ValueError, match="Doubled"):
        nn.replace_(made, "doubled", StoredWeight.empty(Dense((4, 4))))
