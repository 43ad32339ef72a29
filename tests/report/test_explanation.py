from __future__ import annotations

import pytest
from tests.hub import tiny
from tests.report import example
from tests.report.test_tables import printed

from parco.kernels.table import NATIVE
from parco.report.explanation import explain_groups


def test_every_group_names_how_it_is_stored_and_the_kernel_that_runs_it():
    explained = {one.group: one for one in explain_groups(tiny.store(tiny.model("llama")), [], 64)}
    down = explained["model.layers.1.mlp.down_proj"]
    assert down.choice == "quantized(int4:32, 36x50)"
    assert "int" in down.kernels
    [decode], [prefill] = down.members[0].decode, down.members[0].prefill
    assert "1 rows of torch.bfloat16" in str(decode.call)
    assert "64 rows" in str(prefill.call)
    assert {member.name for member in explained["model.layers.0.self_attn.qkv"].members} == {
        f"model.layers.0.self_attn.{part}_proj" for part in "qkv"
    }


def test_what_parco_does_not_store_is_run_by_pytorch():
    explained = explain_groups(tiny.model("gpt2"), [], 64)
    assert {one.kernels for one in explained} == {NATIVE}
    assert any(one.choice == "bfloat16 36x36" for one in explained)


def test_experts_are_explained_one_by_one():
    explained = {one.group: one for one in explain_groups(tiny.store(tiny.model("mixtral")), [], 64)}
    experts = next(one for name, one in explained.items() if "experts" in name)
    assert len(experts.members) == 4
    assert experts.members[0].name.endswith("[0]")


def test_the_fit_record_is_joined_by_name():
    row = example.result()["groups"][1] | {"group": "model.layers.0.self_attn.qkv"}
    explained = explain_groups(tiny.store(tiny.model("llama")), [row], 64)
    assert [one.group for one in explained if one.fitted is not None] == ["model.layers.0.self_attn.qkv"]
    assert [one.choice for one in explained if one.fitted is not None] == [row["method"]]


def test_one_layer_is_found_by_its_group_or_its_own_name():
    model = tiny.store(tiny.model("llama"))
    for name in ("model.layers.0.mlp.gate_up", "model.layers.0.mlp.up_proj"):
        assert [one.group for one in explain_groups(model, [], 64, only=name)] == ["model.layers.0.mlp.gate_up"]
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_prj.*model\.layers\.0\.mlp\.up_proj"):
        explain_groups(model, [], 64, only="model.layers.0.mlp.up_prj")


def test_tables_of_layers_keep_names_with_brackets():
    from parco.report import tables

    explained = explain_groups(tiny.store(tiny.model("llama")), [], 64)
    shown = printed(tables.layers_table(explained), width=200)
    assert "quantized(int4:32, 36x50)" in shown
    assert len(shown.splitlines()) == len(explained) + 1
