"""One clear line for each wrong use; the model and the disk stay as they were."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapters.models import moved
from tests.nn.models import logits, model

import parco
from parco import adapters


@pytest.fixture(scope="module")
def made():
    return model("llama")


@pytest.fixture
def saved(tmp_path):
    source = model("llama")
    adapters.add_(source, "lora(4)")
    moved(source)
    return adapters.save(source, tmp_path / "saved")


def refused(made, says, call):
    names, trains = list(made.state_dict()), [each.requires_grad for each in made.parameters()]
    before = logits(made)
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        call()
    assert "\n" not in str(error.value)
    assert list(made.state_dict()) == names
    assert [each.requires_grad for each in made.parameters()] == trains
    assert torch.equal(logits(made), before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"targets": ["q_prj"]}, "'q_prj' is the name of no module; the nearest are q_proj"),
        ({"targets": ["self_attn.q_projj"]}, "the nearest are model.layers."),
        ({"targets": r".*\.gate"}, r"targets='.*\\.gate' matches no module; the nearest are gate_proj"),
        ({"targets": ["embed_tokens"]}, "'model.embed_tokens' is a Embedding; adapters stand on linear layers"),
        ({"targets": []}, "targets is empty"),
        ({"targets": "("}, "is no regular expression"),
        ({"method": "lora(49)"}, "rank 49 is above the smaller side of model.layers.0.self_attn.q_proj, which"),
        ({"rank_pattern": {"up_prj": 2}}, "rank_pattern: 'up_prj' matches none of the 14 layers"),
        ({"alpha_pattern": {"lm_head": 2}}, "alpha_pattern: 'lm_head' matches none"),
        ({"rank_pattern": {"k_proj": 30}}, "rank 30 is above the smaller side of model.layers.0.self_attn.k_proj"),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save: 'lm_haed' is the name of no module"),
        ({"modules_to_save": ["q_proj"]}, "is a target of the adapter too"),
        ({"modules_to_save": ["self_attn"]}, "holds 'model.layers.0.self_attn.q_proj', which gets an adapter"),
        ({"name": "a.b"}, "name='a.b' cannot be an adapter's"),
        ({"name": "__base__"}, "name='__base__' cannot be an adapter's"),
    ],
)  # fmt: skip
def test_what_add_refuses(made, options, says):
    refused(made, says, lambda: adapters.add_(made, **{"method": "lora(4)", **options}))


def test_a_name_is_given_once(made):
    other = model("llama")
    adapters.add_(other, "lora(4)", ["q_proj"])
    refused(other, "name='default' is taken", lambda: adapters.add_(other, "lora(4)"))
    refused(other, "no adapter 'b': the model carries 'default'", lambda: adapters.set_(other, "b"))
    refused(other, "q_proj carries adapters; merge or remove them first",
            lambda: parco.convert_(other, parco.Quantize("int4:32")))  # fmt: skip
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        adapters.add_({}, "lora(4)")  # pyright: ignore


def test_an_adapter_of_another_model_is_named_by_its_first_tensor_that_does_not_fit(saved):
    other = model("llama odd")
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    says = f"tensor '{key}' is 4x88, and model.layers.0.mlp.down_proj, a matrix of 36x77, needs 4x77"
    refused(other, says, lambda: adapters.load_(other, saved))
    stranger = model("gpt2")
    refused(stranger, "down_proj, which this model has not", lambda: adapters.load_(stranger, saved))


def change(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; LORA (with DoRA) and VERA are taken"),
        ({"peft_type": None}, "peft_type is None"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias is True, which computes in a way not known here"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora', after which the base is another one"),
        ({"r": 8}, "is 4x88, and model.layers.0.mlp.down_proj, a matrix of 48x88, needs 8x88"),
        ({"r": "four"}, "rank='four'; a whole number"),
        ({"use_dora": True}, "lacks model.layers.0.mlp.down_proj's magnitude"),
    ],
)
def test_a_config_that_says_something_else_is_refused(made, saved, changes, says):
    change(saved, **changes)
    refused(made, says, lambda: adapters.load_(made, saved))


def test_broken_files_are_refused(made, saved, tmp_path):
    def broken(name):
        folder = tmp_path / name
        shutil.copytree(saved, folder)
        return folder

    folder = broken("truncated")
    whole = (saved / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[:-100])
    refused(made, "is truncated: its header promises", lambda: adapters.load_(made, folder))
    (folder / "adapter_model.safetensors").write_bytes(b"nothing of the kind")
    refused(made, "is truncated or not safetensors", lambda: adapters.load_(made, folder))
    (folder / "adapter_model.safetensors").unlink()
    refused(made, "has no adapter_model.safetensors", lambda: adapters.load_(made, folder))
    (folder / "adapter_config.json").write_text("{")
    refused(made, "is not JSON", lambda: adapters.load_(made, folder))
    (folder / "adapter_config.json").unlink()
    refused(made, "is no adapter: it has no adapter_config.json", lambda: adapters.load_(made, folder))
    with pytest.raises(FileNotFoundError, match="no folder"):
        adapters.load_(made, tmp_path / "absent")
    folder = broken("nan")
    tensors = load_file(folder / "adapter_model.safetensors")
    first = next(iter(tensors))
    tensors[first][0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    refused(made, f"tensor {first!r} of", lambda: adapters.load_(made, folder))
    tensors[first][0, 0] = 0
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(2, 101)
    save_file(tensors, folder / "adapter_model.safetensors")
    refused(made, "lora_embedding_A' is no part of an adapter of linear layers", lambda: adapters.load_(made, folder))


def test_a_save_replaces_an_adapter_and_nothing_else(saved, tmp_path):
    source = model("llama")
    adapters.add_(source, "lora(2)", ["q_proj"])
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds files that parco did not save"):
        adapters.save(source, other)
    assert [each.name for each in other.iterdir()] == ["mine.txt"]
    with pytest.raises(ValueError, match="no adapter 'b'"):
        adapters.save(source, saved, "b")
    with pytest.raises(ValueError, match="is a file of the model itself"):
        adapters.save(source, saved, extra={"adapter_config.json": "{}"})
    assert json.loads((saved / "adapter_config.json").read_text())["r"] == 4
    adapters.save(source, saved)
    assert json.loads((saved / "adapter_config.json").read_text())["r"] == 2
    assert sorted(each.name for each in tmp_path.iterdir()) == ["other", "saved"]
