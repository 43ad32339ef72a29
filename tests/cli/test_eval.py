"""`parco eval` against a plain Transformers loop, on a dense and on a fitted folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hub import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from parco import hub
from parco.cli import main
from parco.fitting import evaluate, judge


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(tiny.SENTENCES * 12))
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("models") / "dense", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, dense: Path) -> Path:
    loaded = hub.load(dense)
    folder = tmp_path_factory.mktemp("models") / "fitted"
    hub.save(tiny.store(loaded.model), loaded.tokenizer, folder)
    return folder


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is what is tested here: one round of timing, and no fresh process for the memory."""
    monkeypatch.setenv("PARCO_CACHE", str(tmp_path))
    monkeypatch.setattr(judge, "ROUNDS", 1)
    monkeypatch.setattr(evaluate, "peak_memory", lambda folder: None)


def plain_loss(folder: Path, text: Path) -> float:
    """The loop that anybody would write."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(), return_tensors="pt")["input_ids"][0]
    losses = []
    with torch.no_grad():
        for start in range(0, len(ids) - 63, 64):
            window = ids[None, start : start + 64]
            losses.append(float(model(input_ids=window, labels=window).loss))
    return sum(losses) / len(losses)


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert main(["eval", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_loss_is_that_of_a_plain_loop(dense: Path, fitted: Path, text: Path, capsys: pytest.CaptureFixture[str]):
    for folder in (dense, fitted):
        found = measured(capsys, str(folder), "--data", str(text))
        assert found["against"] is None
        assert found["model"]["loss"] == pytest.approx(plain_loss(folder, text), abs=1e-4)
        assert found["model"]["perplexity"] == pytest.approx(math.exp(found["model"]["loss"]))


def test_against_another_model_kl_and_agreement_are_measured(
    dense: Path, fitted: Path, text: Path, capsys: pytest.CaptureFixture[str]
):
    found = measured(capsys, str(fitted), "--data", str(text), "--against", str(dense))
    assert found["model"]["kl"] > 0
    assert 0 < found["model"]["top1"] <= 1
    assert (found["against"]["kl"], found["against"]["top1"]) == (0, 1)
    assert found["model"]["bytes"] < found["against"]["bytes"]
    same = measured(capsys, str(dense), "--data", str(text), "--against", str(dense))
    assert same["model"]["kl"] == pytest.approx(0, abs=1e-7)
    assert same["model"]["top1"] == 1


def test_models_of_different_tokenizers_are_not_compared(
    dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = tiny.folder(tmp_path / "other")
    settings = json.loads((other / "tokenizer.json").read_text())
    settings["model"]["merges"] = settings["model"]["merges"][:5]
    (other / "tokenizer.json").write_text(json.dumps(settings))
    capsys.readouterr()
    assert main(["eval", str(dense), "--data", str(text), "--against", str(other)]) == 2
    assert "one tokenizer" in capsys.readouterr().err


def test_the_table_shows_both(dense: Path, fitted: Path, text: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["eval", str(fitted), "--data", str(text), "--against", str(dense)]) == 0
    shown = capsys.readouterr().out
    assert "against" in shown.splitlines()[0]
    assert "Same most likely token" in shown


def test_generate_writes_the_prompt_and_goes_on_the_same_for_a_seed(fitted: Path, capsys: pytest.CaptureFixture[str]):
    written = []
    for seed in ("3", "3", "4"):
        capsys.readouterr()
        assert main(["generate", str(fitted), "def fit", "--tokens", "12", "--temperature", "1.5", "--seed", seed]) == 0
        written.append(capsys.readouterr().out)
    assert written[0].startswith("def fit")
    assert len(written[0]) > len("def fit\n")
    assert written[0] == written[1] != written[2]


def test_explain_names_the_kernel_of_every_layer(fitted: Path, capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    assert main(["explain", str(fitted), "--json"]) == 0
    explained = json.loads(capsys.readouterr().out)
    down = next(one for one in explained if one["group"] == "model.layers.0.mlp.down_proj")
    assert down["members"][0]["stored"] == "quantized(int4:32, 36x50)"
    assert down["members"][0]["decode"][0]["kernel"]
    assert main(["explain", str(fitted), "--layer", "model.layers.0.mlp.up_proj"]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.0.mlp.up_proj: quantized(int4:32, 50x36)" in shown
    assert "one token" in shown
    assert "gate_proj" in shown


def test_explain_says_that_a_model_was_not_fitted(dense: Path, fitted: Path, capsys: pytest.CaptureFixture[str]):
    for folder, said in (
        (dense, f"parco fit {dense} makes it smaller"),
        (fitted, f"{fitted} holds no result.json of a fit"),
    ):
        capsys.readouterr()
        assert main(["explain", str(folder)]) == 0
        shown = capsys.readouterr().out
        assert said in shown
        assert "passed over" not in shown
