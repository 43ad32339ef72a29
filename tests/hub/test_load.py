"""`hub.load`: what it gives, and the one line that each broken folder gets."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.hub import tiny
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from parco import hub


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture
def copy(dense: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense, tmp_path / "copy"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a folder was being loaded and the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def refused(folder: Path | str, kind: type[Exception] = ValueError) -> str:
    """The text of the error, which must be of `kind`, one line, and name the folder."""
    with pytest.raises(kind) as caught:
        hub.load(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text
    return text


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_architecture_loads_as_it_was_saved(architecture: str, tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "model", architecture, shard="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    loaded = hub.load(folder)
    assert loaded.path == folder
    assert loaded.model.config.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.bfloat16 for parameter in loaded.model.parameters())
    assert not loaded.model.training
    assert torch.equal(tiny.logits(loaded.model), tiny.logits(tiny.model(architecture)))
    assert loaded.tokenizer("def fit").input_ids == tiny.tokenizer()("def fit").input_ids


@pytest.mark.usefixtures("no_network")
def test_a_fitted_folder_loads_too(tmp_path: Path) -> None:
    made = tiny.store(tiny.model("qwen2"))
    loaded = hub.load(hub.save(made, tiny.tokenizer(), tmp_path / "out"))
    assert torch.equal(tiny.logits(loaded.model), tiny.logits(made))


@pytest.mark.usefixtures("no_network")
def test_pickled_weights_load_without_running_them(copy: Path) -> None:
    state = load_file(copy / "model.safetensors")
    expected = hub.load(copy).model
    (copy / "model.safetensors").unlink()
    torch.save(state, copy / "pytorch_model.bin")
    assert torch.equal(tiny.logits(hub.load(copy).model), tiny.logits(expected))
    state["model.norm.weight"][3] = float("nan")
    torch.save(state, copy / "pytorch_model.bin")
    assert "'model.norm.weight'" in refused(copy)
    torch.save({"model.norm.weight": Path("/")}, copy / "pytorch_model.bin")
    assert "safetensors" in refused(copy)


def test_dtype(dense: Path) -> None:
    assert hub.load(dense, "float32").model.lm_head.weight.dtype == torch.float32
    assert hub.load(dense, torch.float16).model.lm_head.weight.dtype == torch.float16
    with pytest.raises(ValueError, match="dtype='int8'"):
        hub.load(dense, "int8")


def test_low_memory_maps_the_file_and_otherwise_the_weights_are_owned(copy: Path) -> None:
    mapped, owned = hub.load(copy).model, hub.load(copy, low_memory=False).model
    before = tiny.logits(owned)
    assert torch.equal(before, tiny.logits(mapped))
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-20_000, 2)
        file.write(bytes(20_000))
    assert torch.equal(before, tiny.logits(owned))
    assert not torch.equal(before, tiny.logits(mapped))


def test_fingerprint_depends_on_the_content_alone(dense: Path, copy: Path) -> None:
    first = hub.load(dense).fingerprint
    assert len(first) == 64
    (copy / "report.html").write_text("beside the model")
    assert hub.load(copy).fingerprint == first
    config = copy / "config.json"
    config.write_text(config.read_text() + " ")
    assert hub.load(copy).fingerprint != first


def test_missing_folder(tmp_path: Path) -> None:
    assert "no folder" in refused(tmp_path / "absent", FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="'absent'"):
        hub.load("absent")


def test_a_file_is_not_a_folder(copy: Path) -> None:
    refused(copy / "config.json", NotADirectoryError)


def test_only_an_owner_and_a_name_are_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def snapshot(name: str, **_: Any) -> str:
        asked.append(name)
        raise ConnectionError("first line\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for path in ("models/absent", "./absent/model", "/absent/model", "absent", "a/b/c", tmp_path / "a"):
        with pytest.raises(FileNotFoundError):
            hub.load(path)
    assert asked == []
    assert "first line" in refused("owner/name", FileNotFoundError)
    assert asked == ["owner/name"]


def test_a_name_on_the_hub_loads_its_local_copy(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def snapshot(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(copy)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    assert hub.load("owner/name").path == copy
    assert [any(pattern.endswith(".bin") for pattern in patterns) for patterns in asked] == [False]
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    hub.load("owner/name")
    assert [any(pattern.endswith(".bin") for pattern in patterns) for patterns in asked] == [False, False, True]


def test_not_a_model(tmp_path: Path, copy: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(tmp_path / "empty")
    (copy / "config.json").write_text("{")
    assert "not JSON" in refused(copy)
    (copy / "config.json").write_text("{}")
    assert "model_type" in refused(copy)
    (copy / "config.json").write_text('{"model_type": "abacus"}')
    refused(copy)


def test_code_of_a_checkpoint_is_never_run(copy: Path) -> None:
    config = {"model_type": "abacus", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "code.py").write_text("raise SystemExit('this ran')")
    assert "never runs" in refused(copy)


def test_quantized_by_another_library(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq", "bits": 4}
    (copy / "config.json").write_text(json.dumps(config))
    assert "'hqq'" in refused(copy)


def test_no_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    assert "no tokenizer" in refused(copy)


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert "no weights" in refused(copy)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_safetensors(copy: Path, keep: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "truncated" in refused(copy)
    assert str(file) in refused(copy)


def test_a_shard_is_missing(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "model", shard="20KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refused(folder)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite(copy: Path, value: str) -> None:
    word = "NaN" if value == "nan" else "infinity"
    state = load_file(copy / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][7, 11] = float(value)
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    text = refused(copy)
    assert f"'model.layers.1.mlp.up_proj.weight' of '{copy / 'model.safetensors'}' holds {word} at [7, 11]" in text


def test_a_missing_tensor_is_an_error_not_a_random_matrix(copy: Path) -> None:
    state = load_file(copy / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    assert "'model.layers.1.mlp.up_proj.weight'" in refused(copy)


def test_a_missing_tensor_of_a_fitted_model(tmp_path: Path) -> None:
    folder = hub.save(tiny.store(tiny.model("llama")), tiny.tokenizer(), tmp_path / "out")
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight.scale"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert "'model.layers.1.mlp.up_proj.weight.scale'" in refused(folder)


class TableConfig(PreTrainedConfig):
    model_type = "parco_test_table"


class Table(PreTrainedModel):
    """Predicts by looking up a table of pairs: no product anywhere."""

    config_class = TableConfig

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        self.table = torch.nn.Embedding(tiny.VOCABULARY, tiny.VOCABULARY)
        self.post_init()


def test_an_architecture_without_linear_layers(copy: Path) -> None:
    AutoConfig.register(TableConfig.model_type, TableConfig, exist_ok=True)
    AutoModelForCausalLM.register(TableConfig, Table, exist_ok=True)
    Table(TableConfig()).save_pretrained(copy)
    assert "without linear layers (Table)" in refused(copy)


def test_an_encoder_is_not_a_causal_model(copy: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "vit"}')
    refused(copy)


def test_shipped_texts() -> None:
    texts = hub.embedded_texts()
    assert texts.heldout.startswith('"""') or "import" in texts.heldout
    assert len(texts.calibration.encode()) <= 1_000_000
    assert texts.heldout[:2000] not in texts.calibration
    assert hub.embedded_path().is_dir()


def test_shipped_model_knows_python() -> None:
    """Four nats below a guess among its 8,192 tokens (9.01), on text that it never saw, in at most 32 MB of bf16."""
    assert (hub.embedded_path() / "model.safetensors").stat().st_size <= 32_000_000
    shipped = hub.load(hub.embedded_path())
    assert shipped.model.config.dtype == torch.bfloat16
    tokens = shipped.tokenizer(hub.embedded_texts().heldout[:6000], return_tensors="pt").input_ids[:, :512]
    with torch.no_grad():
        assert shipped.model(tokens, labels=tokens).loss < 5.0


def test_an_index_names_files_of_its_own_folder_only(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "model", shard="20KB")
    index = folder / "model.safetensors.index.json"
    shards = json.loads(index.read_text())
    shard = next(iter(shards["weight_map"].values()))
    (folder / shard).rename(tmp_path / shard)
    shards["weight_map"] |= {key: f"../{shard}" for key, value in shards["weight_map"].items() if value == shard}
    index.write_text(json.dumps(shards))
    assert "no file of its own folder" in refused(folder)
    index.write_text('{"weight_map": []}')
    assert "weight_map" in refused(folder)


def test_what_is_checked_is_what_is_loaded(copy: Path) -> None:
    """Beside a whole file an index is not read, by Transformers neither."""
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    hub.load(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    assert "other.safetensors" in refused(copy)


def header(folder: Path) -> None:
    text = b'{"model.norm.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}'
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"1234")


def nested(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def no_heads(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("head_dim", None)
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 0}))


def hidden_text(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "36"}))


def other_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')


@pytest.mark.parametrize("spoil", [header, nested, no_heads, hidden_text, other_tokenizer])
def test_malformed_files_are_refused_in_a_line(copy: Path, spoil: Callable[[Path], None]) -> None:
    spoil(copy)
    refused(copy)


def test_views_of_one_storage_stay_apart_when_owned(copy: Path) -> None:
    model = tiny.model("llama")
    both = torch.randn(2, *model.model.layers[0].self_attn.q_proj.weight.shape).to(torch.bfloat16)
    model.model.layers[0].self_attn.q_proj.weight.data = both[0]
    model.model.layers[1].self_attn.q_proj.weight.data = both[1]
    sys.modules["parco.hub.load"]._own(model)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, both[0])
    assert torch.equal(model.model.layers[1].self_attn.q_proj.weight, both[1])
