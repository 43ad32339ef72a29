"""What is known of architectures: blocks, groups, names."""

import pytest
import torch
from tests.nn.models import CONFIGS, TIED, model

from parco import nn

KINDS = {
    "llama": ["embed", "qkv", "out", "gate_up", "down", "head"],
    "llama tied": ["embed", "qkv", "out", "gate_up", "down"],
    "gpt2": ["embed", "qkv", "out", "up", "down"],
    "gpt-neox": ["embed", "qkv", "out", "up", "down", "head"],
    "phi": ["embed", "qkv", "out", "up", "down", "head"],
    "phi3": ["embed", "out", "qkv", "gate_up", "down", "head"],
    "mixtral": ["embed", "qkv", "out", "experts_gate_up", "experts_down", "head"],
    "qwen3-moe": ["embed", "qkv", "out", "experts_gate_up", "experts_down", "head"],
    "gpt-oss": ["embed", "qkv", "out", "experts_gate_up", "experts_down", "head"],
    "qwen2-moe": [
        "embed", "qkv", "out", "experts_gate_up", "experts_down", "gate_up", "down", "router", "head",
    ],
    "opt": ["embed", "qkv", "out", "up", "down", "other", "other"],
}  # fmt: skip


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


def test_every_matrix_is_in_exactly_one_group(name):
    made = model(name)
    members = [member for group in nn.groups(made) for member in group.members]
    assert len(members) == len(set(members))
    assert set(members) == {*nn.linears(made), nn.embedding_name(made)}


def test_groups_hold_all_large_parameters(name):
    """Counted from the parameters themselves: what no group holds are norms, biases, routers and positions."""
    made = model(name)
    held = {
        id(getattr(nn.site(made, member).module, nn.site(made, member).expert[0]))
        if nn.site(made, member).kind == "expert"
        else id(nn.site(made, member).module.weight)
        for group in nn.groups(made)
        for member in group.members
    }
    rest = {n for n, p in made.named_parameters() if p.dim() > 1 and id(p) not in held}
    small = ("mlp.gate.weight", "router.weight", "_proj_bias", "wpe.weight", "embed_positions.weight")
    assert all(n.endswith(small) for n in rest)


def test_blocks_are_the_decoder_layers(name):
    made = model(name)
    found = nn.blocks(made)
    assert len(found) == 2
    assert all(made.get_submodule(path) is block for path, block in found)
    assert {group.block for group in nn.groups(made)} == {0, 1, None}
    for group in nn.groups(made):
        if group.block is not None:
            assert all(member.startswith(found[group.block][0] + ".") for member in group.members)


def test_members_of_a_group_read_one_input(name):
    made = model(name)
    for group in nn.groups(made):
        assert len({nn.site(made, member).shape[1] for member in group.members}) == 1


@pytest.mark.parametrize("name", KINDS)
def test_kinds(name):
    found = nn.groups(model(name))
    assert [group.kind for group in found if group.block in (0, None)] == KINDS[name]
    names = [group.name for group in found]
    assert len(names) == len(set(names))


def test_tied_embedding_and_head_are_one_group(name):
    found = {group.name: group for group in nn.groups(model(name))}
    assert ("head" in found) == (name not in TIED)
    assert len(found["embed"].members) == (2 if name in TIED else 1)


def test_matrices_multiply_as_the_layers_do(name):
    made = model(name)
    for path, where in nn.linears(made).items():
        w, b = nn.matrix(made, path), nn.bias(made, path)
        assert tuple(w.shape) == where.shape
        assert b is None or b.shape == (where.shape[0],)
        if where.kind != "expert":
            x = torch.randn(3, where.shape[1])
            torch.testing.assert_close(torch.nn.functional.linear(x, w, b), where.module(x))


def test_experts_are_slices_of_the_parameter():
    made = model("mixtral")
    stack = made.model.layers[1].mlp.experts.down_proj
    assert torch.equal(nn.matrix(made, "model.layers.1.mlp.experts.down_proj[3]"), stack[3])


def test_on_the_meta_device():
    import transformers

    for name in ("llama tied", "mixtral", "gpt2"):
        with torch.device("meta"):
            made = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
        assert nn.groups(made) == nn.groups(model(name))


class Unknown(torch.nn.Module):
    """A model that no architecture table knows, without Transformers' accessors."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(50, 16)
        self.stack = torch.nn.ModuleList(
            torch.nn.ModuleDict({"mix": torch.nn.Linear(16, 16), "wide": torch.nn.Linear(16, 40, bias=False)})
            for _ in range(3)
        )
        self.side = torch.nn.ModuleList([torch.nn.Linear(16, 4)])
        self.attention = torch.nn.MultiheadAttention(16, 2)
        self.unembed = torch.nn.Linear(16, 50)


def test_an_unknown_model_goes_by_structure():
    found = nn.groups(Unknown())
    assert [path for path, _ in nn.blocks(Unknown())] == ["stack.0", "stack.1", "stack.2"]
    assert [(g.name, g.block) for g in found] == [
        ("embed", None), ("stack.0.mix", 0), ("stack.0.wide", 0), ("stack.1.mix", 1), ("stack.1.wide", 1),
        ("stack.2.mix", 2), ("stack.2.wide", 2), ("side.0", None), ("head", None),
    ]  # fmt: skip
    assert found[-1].members == ("unembed",)


def test_a_model_without_matrices_has_no_groups():
    assert nn.groups(torch.nn.Sequential(torch.nn.LayerNorm(4))) == []
    assert nn.blocks(torch.nn.Sequential(torch.nn.LayerNorm(4))) == []


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("model.layers.7.mlp", "has no module 'model.layers.7.mlp'"),
        ("model.norm", "MixtralRMSNorm"),
        ("model.layers.0.mlp.experts.down_proj[5]", "experts 0 to 4"),
        ("model.layers.0.self_attn.down_proj[0]", "MixtralAttention"),
    ],
)
def test_an_unknown_site_is_refused(path, said):
    with pytest.raises(ValueError, match=said.replace("[", r"\[")):
        nn.matrix(model("mixtral"), path)
