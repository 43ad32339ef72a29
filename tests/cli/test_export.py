"""`parco export`: from every kind of file to every other, by name, and one line for what cannot be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hub import tiny
from tests.hub.test_gptq import Quantizer

from parco import cli, hub
from parco.nn import StoredWeight

pytest.importorskip("gguf")
SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32, "num_key_value_heads": 2,
}  # fmt: skip


def export(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert cli.main(["export", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def logits(place: Path) -> torch.Tensor:
    return tiny.logits(hub.load(place).model)


def test_a_model_goes_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = tiny.folder(tmp_path / "dense", **SIZES)
    done = export(capsys, dense, "--to", "gguf", "--type", "q4_0", "--ends", "BF16", "--out", tmp_path / "model.gguf")
    assert (done["stored"], done["to"]) == ({}, "gguf")
    assert done["nbytes"] == (tmp_path / "model.gguf").stat().st_size
    done = export(capsys, tmp_path / "model.gguf", "--to", "compressed-tensors", "--out", tmp_path / "theirs")
    assert done["stored"] == {"int4:32:fp16": 14}
    export(capsys, tmp_path / "theirs", "--out", tmp_path / "ours")
    export(capsys, tmp_path / "ours", "--to", "gguf", "--out", tmp_path / "again.gguf")
    wanted = logits(tmp_path / "model.gguf")
    assert torch.equal(logits((tmp_path / "again.gguf").rename(tmp_path / "AGAIN.GGUF")), wanted)
    for name in ("theirs", "ours"):
        assert torch.equal(logits(tmp_path / name), wanted), name
    stored = [part.spec for part in hub.load(tmp_path / "ours").model.modules() if isinstance(part, StoredWeight)]
    assert len(stored) == 14
    export(capsys, dense, "--out", tmp_path / "copy")
    assert "quantization_config" not in json.loads((tmp_path / "copy" / "config.json").read_text())


def test_what_is_printed_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tiny.model("llama", torch.float16, **SIZES)
    folder = Quantizer("gptq", 4, 64, desc_act=True).save(made, tmp_path / "theirs")
    assert cli.main(["export", str(folder), "--out", str(tmp_path / "ours")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "none: it is dense" in text
    assert "14 matrices have groups of columns in the order of activations" in text
    assert cli.main(["generate", str(folder), "def", "--tokens", "2"]) == 0
    assert "14 matrices have groups of columns" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", ""], "--out '' names no place"),
        (["--to", "onnx"], "--to onnx is none of parco, compressed-tensors, gguf"),
        (["--type", "Q8_0"], "--type Q8_0 is for --to gguf, not for --to parco"),
        (["--to", "gguf", "--dense"], "--dense is for --to compressed-tensors, not for --to gguf"),
        (["--round-scales"], "--round-scales is for --to gguf, not for --to parco"),
        (["--to", "gguf", "--type", "Q4_K"], "type='Q4_K' is none of F32"),
        (["--to", "gguf", "--type", "TQ2_0"], "blocks of 256"),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.folder(tmp_path / "dense", **SIZES)
    assert cli.main(["export", str(folder), "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_files_of_others_are_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.folder(tmp_path / "dense", **SIZES)
    for to in ("parco", "compressed-tensors"):
        assert cli.main(["export", str(folder), "--out", str(folder), "--to", to]) == 2
        assert "did not save" in capsys.readouterr().err
    assert cli.main(["export", str(folder), "--out", str(folder), "--to", "gguf"]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert tiny.logits(hub.load(folder).model).shape[-1] == tiny.VOCABULARY


def test_a_fit_s_plan_and_report_go_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, pages = tiny.store(tiny.model("llama", **SIZES), embeddings=None), {"report.html": "<p>", "result.json": "{}"}
    fitted = hub.save(made, tiny.tokenizer(), tmp_path / "fitted", '{"a": 1}', {**pages, "diary.txt": "mine"})
    export(capsys, fitted, "--out", tmp_path / "again")
    here = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert {name: here.get(name) for name in ("plan.json", *pages)} == {
        "plan.json": b'{"a": 1}', "report.html": b"<p>", "result.json": b"{}",
    }  # fmt: skip
    assert "diary.txt" not in here
    notes = [hub.export(fitted, tmp_path / f"for-{to}", to)["notes"] for to in ("gguf", "compressed-tensors", "parco")]
    assert notes == [
        *2 * [(f"plan.json, report.html, result.json of the fit stay in {fitted}",)],
        (),
    ]


@pytest.mark.parametrize(("to", "name"), [("gguf", "model.gguf"), ("parco", "ours"), ("compressed-tensors", "ours")])
def test_a_model_is_not_written_over_itself(
    to: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, place = tiny.store(tiny.model("llama", **SIZES), embeddings=None), tmp_path / name
    (hub.save_gguf if to == "gguf" else hub.save)(made, tiny.tokenizer(), place)
    before = {path.name: path.read_bytes() for path in ([place] if place.is_file() else place.iterdir())}
    link = tmp_path / "link.gguf"
    link.symlink_to(place)
    for out in (place, link, tmp_path / "." / name):
        assert cli.main(["export", str(place), "--out", str(out), "--to", to]) == 2
        assert "holds the model that is read" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in ([place] if place.is_file() else place.iterdir())} == before


def test_a_folder_that_holds_the_model_s_file_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tiny.store(tiny.model("llama", **SIZES), embeddings=None)
    folder = hub.save(made, tiny.tokenizer(), tmp_path / "ours")
    file = hub.save_gguf(made, tiny.tokenizer(), folder / "model.gguf")
    assert cli.main(["export", str(file), "--out", str(folder)]) == 2
    assert "holds the model that is read" in capsys.readouterr().err
    assert file.exists()


def test_a_file_of_another_kind_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = tiny.folder(tmp_path / "dense", **SIZES), tmp_path / "letter.txt"
    file.write_text("Dear reader")
    assert cli.main(["export", str(folder), "--out", str(file), "--to", "gguf"]) == 2
    assert "is a file of another kind" in capsys.readouterr().err
    assert file.read_text() == "Dear reader"
    for content in (b"", b"GGUF of yesterday"):
        file.write_bytes(content)
        export(capsys, folder, "--out", file, "--to", "gguf")
        assert torch.equal(logits(file.rename(tmp_path / "model.gguf")), logits(folder))


def test_without_the_library_gguf(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = tiny.folder(tmp_path / "dense", **SIZES), tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    for words in (
        ["generate", str(file), "def"],
        ["export", str(folder), "--to", "gguf", "--out", str(tmp_path / "out")],
    ):
        assert cli.main(words) == 2
        assert "pip install 'parco[gguf]'" in capsys.readouterr().err
    with pytest.raises(ImportError):
        hub.load(file)
