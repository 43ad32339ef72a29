"""`hub.save`: whole or absent, the same bytes every time, and never over somebody else's files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import SafetensorError, safe_open
from tests.hub import tiny

import parco
from parco import hub, nn
from parco.nn import StoredWeight
from parco.nn.saved import HINT
from parco.weights import BlockSparse, SemiSparse


@pytest.fixture(scope="module")
def fitted() -> Any:
    return tiny.store(tiny.model("qwen2"))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_what_is_written(fitted: Any, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<p>")
    extra = {"report.html": tmp_path / "page.html", "note.txt": "é", "raw": b"\0"}
    folder = hub.save(fitted, tiny.tokenizer(), tmp_path / "deep" / "out", plan={"b": 1, "a": 2}, extra=extra)
    assert {*os.listdir(folder)} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "plan.json", "report.html", "note.txt", "raw",
    }  # fmt: skip
    assert json.loads((folder / "plan.json").read_text()) == {"b": 1, "a": 2}
    assert ((folder / "report.html").read_text(), (folder / "note.txt").read_text("utf-8")) == ("<p>", "é")
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"]["quant_method"] == "parco"
    assert config["quantization_config"]["weights"]["model.embed_tokens"] == "quantized(int8:row, 301x36)"
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
        text = bytes(file.get_tensor("model.embed_tokens.weight").tolist()).decode()
    assert text == "quantized(int8:row, 301x36)"
    assert {"model.embed_tokens.weight.codes", "model.embed_tokens.weight.scale", HINT} <= names
    assert not any(name.startswith("lm_head") for name in names)
    assert str(tmp_path) not in (folder / "config.json").read_text()


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    loaded = hub.load(tiny.folder(tmp_path / "dense"))
    first = hub.save(tiny.store(loaded.model), loaded.tokenizer, tmp_path / "first", plan={"a": 1})
    again = hub.load(first)
    assert again.fingerprint == hub.load(first).fingerprint
    again.tokenizer(["def", "class Weight"], padding=True, truncation=True, max_length=3)
    assert digests(first) == digests(hub.save(again.model, again.tokenizer, tmp_path / "second", plan={"a": 1}))
    assert hub.load(tmp_path / "second").fingerprint == again.fingerprint
    assert "local" not in (first / "tokenizer_config.json").read_text()


def test_a_loaded_model_is_packed_and_saves_the_same_bytes(fitted: Any, tmp_path: Path) -> None:
    folder = hub.save(fitted, tiny.tokenizer(), tmp_path / "first")
    loaded = hub.load(folder)
    stored = [part for part in loaded.model.modules() if isinstance(part, StoredWeight)]
    assert stored
    assert all(part.is_packed for part in stored)
    again = hub.save(loaded.model, loaded.tokenizer, tmp_path / "second")
    assert digests(again)["model.safetensors"] == digests(folder)["model.safetensors"]
    loaded.model.save_pretrained(tmp_path / "third")
    assert digests(tmp_path / "third")["model.safetensors"] == digests(folder)["model.safetensors"]


def test_shards(fitted: Any, tmp_path: Path) -> None:
    folder = hub.save(fitted, tiny.tokenizer(), tmp_path / "out", shard_bytes=10_000)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert all((folder / name).stat().st_size < 20_000 for name in shards)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == shards
    assert torch.equal(tiny.logits(hub.load(folder).model), tiny.logits(fitted))


def test_sparse_weights_come_back(tmp_path: Path) -> None:
    made = tiny.model("llama")
    specs = (SemiSparse("int8:row", (36, 50)), BlockSparse("bf16", (36, 50), 16, 2))
    for layer, spec in enumerate(specs):
        name = f"model.layers.{layer}.mlp.down_proj"
        matrix = nn.matrix(made, name)
        nn.replace_(made, name, StoredWeight.encode(spec, matrix * spec.keep(matrix.abs())))
    folder = hub.save(made, tiny.tokenizer(), tmp_path / "out")
    loaded = hub.load(folder).model
    assert [layer.mlp.down_proj.weight.spec for layer in loaded.model.layers] == list(specs)
    assert torch.equal(tiny.logits(loaded), tiny.logits(made))
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"model.layers.0.mlp.down_proj.weight.mask", "model.layers.1.mlp.down_proj.weight.blocks"} <= names


def test_five_numbers_to_a_byte_come_back(tmp_path: Path) -> None:
    """In the file they take a byte for five; loaded they are panels of 2 bits, with ternary's logits."""
    made, bits = tiny.model("llama"), tiny.model("llama")
    parco.convert_(made, "ternary5:row")
    parco.convert_(bits, "ternary:row")
    assert torch.equal(tiny.logits(made), tiny.logits(bits))
    folder = hub.save(made, tiny.tokenizer(), tmp_path / "out")
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            rows, columns = made.get_submodule(f"model.layers.0.{name}").weight.shape
            assert file.get_tensor(f"model.layers.0.{name}.weight.codes").shape == (rows, -(-columns // 5))
    for loaded in (hub.load(folder).model, transformers.AutoModelForCausalLM.from_pretrained(folder)):
        assert str(loaded.model.layers[0].mlp.up_proj.weight.spec).startswith("quantized(ternary5:row")
        assert torch.equal(tiny.logits(loaded), tiny.logits(made))
        again = hub.save(loaded, tiny.tokenizer(), tmp_path / "again")
        assert digests(again)["model.safetensors"] == digests(folder)["model.safetensors"]


def test_a_dense_model_can_be_saved_and_is_plain(tmp_path: Path) -> None:
    made = tiny.model("llama")
    folder = hub.save(made, tiny.tokenizer(), tmp_path / "out")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(made.state_dict())
    assert torch.equal(tiny.logits(hub.load(folder).model), tiny.logits(made))


def test_a_folder_of_parco_is_replaced_whole(fitted: Any, tmp_path: Path) -> None:
    hub.save(fitted, tiny.tokenizer(), tmp_path / "out", extra={"old.txt": "old"})
    folder = hub.save(tiny.model("llama"), tiny.tokenizer(), tmp_path / "out")
    assert not (folder / "old.txt").exists()
    assert hub.load(folder).model.config.model_type == "llama"
    assert os.listdir(tmp_path) == ["out"]


def test_a_fit_s_report_is_lost_to_another_fit_only(fitted: Any, tmp_path: Path) -> None:
    pages = {"report.html": "<p>", "result.json": "{}"}
    folder = hub.save(fitted, tiny.tokenizer(), tmp_path / "out", extra=pages)
    before = digests(folder)
    saves: list[Callable[[], Any]] = [
        lambda: hub.save(fitted, tiny.tokenizer(), folder),
        lambda: hub.save_compressed(tiny.model("llama"), tiny.tokenizer(), folder),
        lambda: hub.export(tiny.folder(tmp_path / "dense"), folder),
    ]
    for save in saves:
        with pytest.raises(FileExistsError, match="holds a fit's result, which would be lost"):
            save()
        assert digests(folder) == before
    hub.save(fitted, tiny.tokenizer(), folder, extra={**pages, "result.json": "[]"})
    assert (folder / "result.json").read_text() == "[]"


def test_other_files_are_never_replaced(fitted: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    with pytest.raises(FileExistsError, match="did not save"):
        hub.save(fitted, tiny.tokenizer(), tmp_path / "out")
    with pytest.raises(FileExistsError, match="is a file"):
        hub.save(fitted, tiny.tokenizer(), tmp_path / "out" / "thesis.tex")
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]
    tiny.folder(tmp_path / "dense")
    with pytest.raises(FileExistsError):
        hub.save(fitted, tiny.tokenizer(), tmp_path / "dense")
    (tmp_path / "empty").mkdir()
    hub.save(fitted, tiny.tokenizer(), tmp_path / "empty")


@pytest.mark.parametrize("name", ["../out.txt", "a/b", "/tmp/x", "", "..", "config.json", "model.safetensors"])
def test_extra_files_have_plain_names_of_their_own(fitted: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="extra="):
        hub.save(fitted, tiny.tokenizer(), tmp_path / "out", extra={name: "x"})
    assert os.listdir(tmp_path) == []


def test_a_disk_too_small_is_known_beforehand(fitted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match="no room for the model") as caught:
        hub.save(fitted, tiny.tokenizer(), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def in_a_child(task: Callable[[], Any]) -> int:
    """Runs `task` in a forked process, so that it may be limited or killed; the status as `os.waitpid` gives it."""
    child = os.fork()
    if child == 0:
        try:
            task()
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def test_a_write_that_fails_half_way_leaves_nothing(fitted: Any, tmp_path: Path) -> None:
    """The kernel refuses to let any file grow beyond 20 kB, which is where a full disk would refuse."""
    before = digests(hub.save(tiny.model("llama"), tiny.tokenizer(), tmp_path / "out"))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(OSError, match=r"^\[Errno \d+\] nothing was saved: .*out'$"):
            hub.save(fitted, tiny.tokenizer(), tmp_path / "out")
        os._exit(7)

    assert os.waitstatus_to_exitcode(in_a_child(limited)) == 7
    assert os.listdir(tmp_path) == ["out"]
    assert digests(tmp_path / "out") == before


def test_a_full_disk_is_called_that(fitted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(sys.modules["parco.hub.save"], "save_file", full)
    with pytest.raises(OSError, match="the disk is full") as caught:
        hub.save(fitted, tiny.tokenizer(), tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("moment", ["flush", "put_in_place"])
def test_killed_while_saving(fitted: Any, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["parco.hub.save"], moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        status = in_a_child(lambda: hub.save(fitted, tiny.tokenizer(), tmp_path / "out"))
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert len(os.listdir(tmp_path)) == 1
    hub.save(fitted, tiny.tokenizer(), tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_a_former_folder_comes_back_if_the_swap_was_killed(fitted: Any, tmp_path: Path) -> None:
    """Between the two renames the former folder lies beside; the next save finds it, and here then fails."""
    folder = hub.save(fitted, tiny.tokenizer(), tmp_path / "out")
    before = digests(folder)
    folder.rename(tmp_path / ".out.parco-999999999-former")
    with pytest.raises(ValueError, match="extra="):
        hub.save(fitted, tiny.tokenizer(), tmp_path / "out", extra={"a/b": ""})
    assert os.listdir(tmp_path) == ["out"]
    assert digests(folder) == before


def test_a_matrix_shared_without_being_declared_is_written_twice(tmp_path: Path) -> None:
    model = tiny.model("llama", tie_word_embeddings=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    parco.convert_(model, "int8:row")
    hub.save(model, tiny.tokenizer(), tmp_path / "out")
    loaded = hub.load(tmp_path / "out").model
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    assert loaded.lm_head.weight.data_ptr() != loaded.model.embed_tokens.weight.data_ptr()


def test_what_a_kill_left_is_found_under_any_name(fitted: Any, tmp_path: Path) -> None:
    folder = hub.save(fitted, tiny.tokenizer(), tmp_path / "out[v1]")
    folder.rename(tmp_path / ".out[v1].parco-999999999-former")
    with pytest.raises(ValueError, match="extra="):
        hub.save(fitted, tiny.tokenizer(), tmp_path / "out[v1]", extra={"a/b": ""})
    assert os.listdir(tmp_path) == ["out[v1]"]
