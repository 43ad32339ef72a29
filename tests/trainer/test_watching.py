"""What a run is told of its formats: readings change nothing, name what is at fault; falling back survives a kill."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.hub import tiny
from tests.trainer.test_run import Killed, KilledAfter, settings

from parco import hub
from parco.fitting.stages import Silent
from parco.trainer import Settings, run

BAD = "model.layers.1.mlp.down_proj"


class Notes(KilledAfter):
    def __init__(self, steps: int = 10**9) -> None:
        super().__init__(steps)
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def broken(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model one of whose matrices has a row so large that under one scale the others are lost."""
    model: Any = hub.load(folder, dtype=torch.float32, low_memory=False).model
    with torch.no_grad():
        model.get_submodule(BAD).weight[3] *= 2.0**22
        model.model.layers[1].mlp.up_proj.weight *= 2.0**-18
    path = tmp_path_factory.mktemp("broken") / "model"
    model.save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def given(folder: Path, text: Path, **changes: Any) -> Settings:
    return settings(folder, text, **{"recipe": "fp8-current", "watch_every": 3, "lr": 1e-4} | changes)


def test_watching_changes_no_bit(folder: Path, text: Path, tmp_path: Path) -> None:
    watched = run(given(folder, text, recipe="nvfp4"), tmp_path / "watched", Silent())
    alone = run(given(folder, text, recipe="nvfp4", watch_every=0), tmp_path / "alone", Silent())
    assert watched["train"] == alone["train"]
    assert alone["watched"] == [] and not (tmp_path / "alone" / "watch.jsonl").exists()
    assert [row["step"] for row in watched["watched"]] == [step for step in (1, 4, 7) for _ in range(6)]
    rows = [json.loads(line) for line in (tmp_path / "watched" / "watch.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 4, 7]
    assert rows[0]["/model.layers.0.mlp.up_proj/output/weight/snr_db"] > 10
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("watched", "alone"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_product_at_fault_is_named_and_falls_back(broken: Path, text: Path, tmp_path: Path) -> None:
    told = Notes()
    low = run(given(broken, text), tmp_path / "low", told)
    named = [note for note in told.notes if note.startswith(f"step 1: {BAD} output")]
    assert named and "weight in fp8_e4m3:tensor" in named[0]
    assert low["said"] == [note for note in told.notes if note.startswith("step ")]

    whole = run(given(broken, text, fallback=True), tmp_path / "whole", Silent())
    assert any(f"{BAD} output: from fp8_e4m3:tensor @ fp8_e4m3:tensor to mxfp8_e4m3" in said for said in whole["said"])
    worst = {
        name: [
            row["underflow"] for row in result["watched"] if (row["product"], row["operand"]) == ("output", "weight")
        ]
        for name, result in (("low", low), ("whole", whole))
    }
    assert worst["low"][-1] > 0.05
    assert worst["whole"][0] == worst["low"][0] and worst["whole"][-1] < worst["low"][-1] / 2

    with pytest.raises(Killed):
        run(given(broken, text, fallback=True), tmp_path / "killed", Notes(5))
    resumed = run(given(broken, text, fallback=True), tmp_path / "killed", Silent(), resume=True)
    assert resumed["train"] == whole["train"] and resumed["said"] == whole["said"]
    assert resumed["watched"] == whole["watched"]
    lines = [(tmp_path / name / "watch.jsonl").read_text() for name in ("whole", "killed")]
    assert lines[0] == lines[1]


def test_falling_back_needs_watching(folder: Path, text: Path) -> None:
    with pytest.raises(ValueError, match="--fallback needs watching"):
        given(folder, text, fallback=True, watch_every=0)
    with pytest.raises(ValueError, match="--watch-every -1"):
        given(folder, text, watch_every=-1)
