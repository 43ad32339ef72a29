"""`--tensorboard`: what a run logs and reads, in event files; and what is said where TensorBoard is missing."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.test_run import Killed, KilledAfter, settings

from parco.cli import main
from parco.fitting.stages import Silent
from parco.trainer import run, tensorboard


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / tensorboard.FOLDER), {"scalars": 0}).Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_log_and_readings_are_in_event_files(folder: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    given = settings(folder, text, recipe="fp16", steps=6, watch_every=2)
    with pytest.raises(Killed):
        run(given, tmp_path, KilledAfter(5), tensorboard=True)
    found = run(given, tmp_path, Silent(), resume=True, tensorboard=True)
    read = scalars(tmp_path)
    # Step 5 was run twice, from the checkpoint at 4.
    assert [step for step, _ in read["loss/train"]] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in read["loss/train"]] == pytest.approx([loss for _, loss in found["train"]])
    assert read["loss/held_out_whole"][0][1] == pytest.approx(found["loss"])
    assert read["loss_scale"][0][1] == 2.0**16
    assert {"learning_rate", "grad_norm", "tokens_per_second", "skipped_steps", "loss/held_out"} <= read.keys()
    watched = [tag for tag in read if tag.startswith("watch/") and tag.endswith("/underflow")]
    assert any("down_proj/grad_weight/grad" in tag for tag in watched)
    assert [step for step, _ in read[watched[0]]] == [1, 3, 5]


def test_that_it_is_missing_is_said_before_anything_is_written(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else find(name, *rest)
    )
    words = ["train", "--model", folder, "--data", text, "--steps", 1, "--out", tmp_path / "out", "--tensorboard"]
    assert main([*map(str, words)]) == 2
    assert "pip install 'parco[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
