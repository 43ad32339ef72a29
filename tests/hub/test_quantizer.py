"""Folders that `save` wrote come back through Transformers' own `from_pretrained` as the same model, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.hub import tiny
from transformers import AutoModel, AutoModelForCausalLM, pipeline

import parco
from parco import hub, nn, weights
from parco.nn.saved import describe

hub.register()


def reload(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)


def stored_names(model: Any) -> set[str]:
    found = describe(model)
    return {*found.weights, *found.tied}


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_architecture_comes_back_bit_for_bit(architecture: str, tmp_path: Path) -> None:
    made = tiny.store(tiny.model(architecture))
    again, information = reload(hub.save(made, tiny.tokenizer(), tmp_path / "out"), output_loading_info=True)
    assert torch.equal(tiny.logits(made), tiny.logits(again))
    assert not any(information.values())
    assert describe(again) == describe(made)
    assert {kind.kind for kind in nn.groups(made) if not set(kind.members) <= stored_names(again)} <= {"router"}
    assert all(part.is_packed for part in again.modules() if isinstance(part, nn.StoredWeight))
    assert [name for name, _ in made.named_parameters()] == [name for name, _ in again.named_parameters()]
    for (name, first), (other, second) in zip(made.state_dict().items(), again.state_dict().items(), strict=True):
        assert (name, first.dtype) == (other, second.dtype)
        assert torch.equal(first, second)


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "gemma"])
def test_tied_heads_stay_one_tensor(architecture: str, tmp_path: Path) -> None:
    folder = hub.save(tiny.store(tiny.model(architecture)), tiny.tokenizer(), tmp_path / "out")
    again = reload(folder)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    again.tie_weights()
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    name = next(iter(json.loads((folder / "config.json").read_text())["quantization_config"]["tied"]))
    assert name in ("lm_head",)


def test_a_head_that_differs_from_a_tied_embedding_stays_apart(tmp_path: Path) -> None:
    """A checkpoint may hold both although its configuration ties them; Transformers then keeps both, and so does a
    fitted one."""
    made = tiny.model("qwen2")
    made.all_tied_weights_keys, made._tied_weights_keys = {}, None
    made.lm_head.weight = torch.nn.Parameter(made.lm_head.weight.detach().flip(0))
    again = reload(hub.save(tiny.store(made), tiny.tokenizer(), tmp_path / "out"))
    assert again.lm_head.weight is not again.model.embed_tokens.weight
    assert torch.equal(tiny.logits(made), tiny.logits(again))


@pytest.mark.parametrize(
    ("block", "embeddings"), [("int8:row", None), ("int3:64:asym", "int4:32"), ("mxfp4", None), ("nvfp4", "int8:row")]
)
def test_other_formats_come_back_bit_for_bit(block: str, embeddings: str | None, tmp_path: Path) -> None:
    made = tiny.store(tiny.model("llama"), block, embeddings)
    assert torch.equal(tiny.logits(made), tiny.logits(reload(hub.save(made, tiny.tokenizer(), tmp_path / "out"))))


def test_composed_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    made = tiny.model("llama")
    for name in [name for name in nn.linears(made) if "mlp" in name]:
        rows, columns = nn.matrix(made, name).shape
        low_rank = f"lowrank(quantized(int8:row, {rows}x16), dense(bf16, 16x{columns}))"
        spec = weights.parse(f"sum(quantized(int4:32, {rows}x{columns}), {low_rank})")
        parts = [
            (torch.rand(t.shape) * (255 if t.dtype == torch.uint8 else 0.01)).to(t.dtype)
            for t in spec.tensors().values()
        ]
        nn.replace_(made, name, nn.StoredWeight(spec, parts, torch.bfloat16))
    again = reload(hub.save(made, tiny.tokenizer(), tmp_path / "out"))
    assert torch.equal(tiny.logits(made), tiny.logits(again))
    assert not any(value.requires_grad for name, value in again.named_parameters() if "_proj.weight." in name)


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt_oss"])
def test_products_come_back(architecture: str, tmp_path: Path) -> None:
    made = tiny.store(tiny.model(architecture))
    plain = tiny.logits(made)
    chosen = nn.set_product_(made, "activations(int8)", lambda name: "down_proj" in name)
    assert not torch.equal(tiny.logits(made), plain)
    again = reload(hub.save(made, tiny.tokenizer(), tmp_path / "out"))
    assert describe(again) == describe(made)
    assert len(describe(again).products) == len(chosen)
    assert torch.equal(tiny.logits(made), tiny.logits(again))


def test_another_dtype_changes_what_is_computed_not_what_is_stored(tmp_path: Path) -> None:
    made = tiny.store(tiny.model("llama"))
    again = reload(hub.save(made, tiny.tokenizer(), tmp_path / "out"), dtype=torch.float32)
    assert tiny.logits(again).dtype == torch.float32
    assert again.model.layers[0].input_layernorm.weight.dtype == torch.float32
    weight = again.model.layers[0].mlp.up_proj.weight
    assert weight.scale.dtype == torch.bfloat16
    assert weight.dtype == torch.float32
    torch.testing.assert_close(tiny.logits(again), tiny.logits(made).float(), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mixtral", "gpt_oss"])
def test_saved_again_through_save_pretrained(architecture: str, tmp_path: Path) -> None:
    made = tiny.store(tiny.model(architecture))
    first = reload(hub.save(made, tiny.tokenizer(), tmp_path / "out"))
    first.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert list((tmp_path / "again").glob("model-00001-of-*"))
    again = reload(tmp_path / "again")
    assert again.config.dtype == torch.bfloat16
    assert torch.equal(tiny.logits(made), tiny.logits(again))


def test_attached_models_save_themselves(tmp_path: Path) -> None:
    dense = tiny.folder(tmp_path / "dense", "mixtral")
    made = hub.attach(tiny.store(AutoModelForCausalLM.from_pretrained(dense)))
    made.save_pretrained(tmp_path / "out")
    assert torch.equal(tiny.logits(made), tiny.logits(reload(tmp_path / "out")))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(device_map: Any, tmp_path: Path) -> None:
    made = tiny.store(tiny.model("qwen2"))
    again = reload(hub.save(made, tiny.tokenizer(), tmp_path / "out"), device_map=device_map)
    assert torch.equal(tiny.logits(made).to(again.device), tiny.logits(again))


def test_generate_and_pipeline(tmp_path: Path) -> None:
    made = tiny.store(tiny.model("qwen2"))
    folder = hub.save(made, tiny.tokenizer(), tmp_path / "out")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    prompt = torch.tensor([[5, 6, 7]])
    expected = made.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    again = reload(folder)
    assert torch.equal(expected, again.generate(prompt, attention_mask=torch.ones_like(prompt), **options))
    text = pipeline("text-generation", model=str(folder), device="cpu")("def fit", **options)[0]["generated_text"]
    assert text.startswith("def fit")
    assert len(text) > len("def fit")


def test_torch_compile(tmp_path: Path) -> None:
    again = reload(hub.save(tiny.store(tiny.model("llama", num_hidden_layers=1)), tiny.tokenizer(), tmp_path / "out"))
    with torch.no_grad():
        compiled = torch.compile(again, fullgraph=True, backend="aot_eager")(tiny.inputs()).logits
    torch.testing.assert_close(compiled, tiny.logits(again), atol=0.05, rtol=0.05)


def test_the_model_without_its_head(tmp_path: Path) -> None:
    made = tiny.store(tiny.model("llama"))
    body = AutoModel.from_pretrained(hub.save(made, tiny.tokenizer(), tmp_path / "out"))
    with torch.no_grad():
        states = (made.model(tiny.inputs()).last_hidden_state, body(tiny.inputs()).last_hidden_state)
    assert torch.equal(*states)


def test_a_factor_of_several_layers_lies_in_the_file_once(tmp_path: Path) -> None:
    made = tiny.model("qwen3")
    parco.convert_(made, "joint(rank=16)>>int8:row")
    folder = hub.save(made, tiny.tokenizer(), tmp_path / "out")
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if "layers.0" in name and "basis.codes" in name]  # noqa: SIM118
    assert [name.rpartition(".weight")[0].rpartition(".")[2] for name in names] == ["gate_proj", "q_proj"]
    again = reload(folder)
    attention = again.model.layers[0].self_attn
    assert attention.q_proj.weight.right is attention.k_proj.weight.right is attention.v_proj.weight.right
    assert torch.equal(tiny.logits(again), tiny.logits(made))
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(tiny.logits(reload(tmp_path / "again")), tiny.logits(made))
    body = AutoModel.from_pretrained(folder)
    attention = body.layers[0].self_attn
    assert attention.q_proj.weight.right is attention.v_proj.weight.right

    config = json.loads((folder / "config.json").read_text())
    shared = config["quantization_config"]["shared"]
    key, attention = "model.layers.0.self_attn.k_proj.weight.right", "model.layers.0.self_attn"
    for owner, message in (
        (f"{attention}.q_proj.weight.left", "the configuration is damaged"),
        ("model.layers.1.self_attn.q_proj.weight.right", "in the same block"),  # of the same shape: wrong numbers
        (f"{attention}.v_proj.weight.right", "a factor of its own"),
        (f"{attention}.z_proj.weight.right", "of a stored layer"),
        (5, "is 5: a factor"),
    ):
        shared[key] = owner
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            reload(folder)
    for damaged in (dict.fromkeys(["a"], "b"), [1]):
        config["quantization_config"]["shared"] = damaged
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="copy or download the configuration again"):
            reload(folder)


def test_gradients_reach_what_is_before_a_stored_weight(tmp_path: Path) -> None:
    again = reload(hub.save(tiny.store(tiny.model("llama")), tiny.tokenizer(), tmp_path / "out"))
    again(tiny.inputs()).logits.float().square().mean().backward()
    norm = again.model.layers[0].input_layernorm.weight
    assert norm.grad is not None
    assert norm.grad.abs().sum() > 0
    assert all(parameter.grad is None for name, parameter in again.named_parameters() if ".weight." in name)


def test_transformers_does_not_quantize_with_parco(tmp_path: Path) -> None:
    from parco.hub.quantizer import ParcoConfig

    with pytest.raises(ValueError, match=r"parco\.convert_"):
        reload(tiny.folder(tmp_path / "dense"), quantization_config=ParcoConfig({}))


def test_a_spec_of_a_later_version_is_named(tmp_path: Path) -> None:
    folder = hub.save(tiny.store(tiny.model("llama")), tiny.tokenizer(), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weights"]["lm_head"] = "knotted(int4, 301x36)"
    config["quantization_config"]["version"] = "99.0"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lm_head.*parco 99\.0.*knotted"):
        reload(folder)
    with pytest.raises(ValueError, match=r"^'.*lm_head.*$"):
        hub.load(folder)
