"""What a model's own library computes otherwise is said by every command that loads the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from tests.hub import tiny

import parco
from parco import hub
from parco.cli import main, terminal

NOTE = "3 layers round their inputs by scales that are not read"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, of which loading says the note; beside it a text that is shorter than a window."""
    monkeypatch.setenv("PARCO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(terminal, "SECONDS_HELD_BACK", 0)
    (tmp_path / "short.txt").write_text("def")
    load = hub.load

    def noted(place: Any, *given: Any, **named: Any) -> hub.Loaded:
        return dataclasses.replace(load(place, *given, **named), notes=(NOTE,) if "noted" in str(place) else ())

    monkeypatch.setattr(hub, "load", noted)
    tiny.folder(tmp_path / "plain")
    return tiny.folder(tmp_path / "noted")


@pytest.mark.parametrize(
    "command",
    [
        "fit noted --data short.txt",
        "eval noted --data short.txt",
        "eval plain --against noted --data short.txt",
        "tune noted --data short.txt --seq 9999 --out out",
        "train --model noted --data short.txt --seq 9999 --steps 1 --out out",
        "merge noted no-adapter --out out",
        "bench noted --peers none-such",
        "bench stored-and-noted --whole --formats int4:32",
    ],
)
def test_a_command_says_it(folder: Path, command: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Before what it is refused for, which ends it here."""
    if "stored" in command:
        loaded = hub.load("plain")
        parco.convert_(loaded.model, "int8:row")
        hub.save(loaded.model, loaded.tokenizer, Path("stored-and-noted"))
    assert main(command.split()) == 2
    said = capfd.readouterr().err
    assert said.count(NOTE) == 1, said
