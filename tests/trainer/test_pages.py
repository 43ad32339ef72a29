"""`parco report`: the page and the tables of a training again, also while it goes on."""

import json
from pathlib import Path

import pytest
from tests.trainer.test_run import Killed, KilledAfter, settings

from parco.cli import main
from parco.fitting.stages import Silent
from parco.report import units
from parco.trainer import compare, run, so_far
from parco.trainer.pages import remake


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main(["report", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_a_run_that_goes_on_and_then_is_done(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, given = tmp_path / "out", settings(folder, text, recipe="mxfp8", steps=6, watch_every=2)
    with pytest.raises(Killed):
        run(given, out, KilledAfter(4))
    shown = printed(capsys, out)
    assert "4 of 6" in shown and "mxfp8" in shown
    assert (out / "report.html").stat().st_size > 1e6
    going = so_far(out)
    assert going is not None and going["step"] == 4
    whole = run(given, out, Silent(), resume=True)
    assert going["run"]["train"] == whole["train"][:4]
    assert going["run"]["held_out"] == whole["held_out"][:1]
    assert going["run"]["settings"] == whole["settings"]
    assert going["run"]["watched"] == whole["watched"][: len(going["run"]["watched"])] != []
    assert going["run"].keys() == whole.keys()
    page = (out / "report.html").read_text()
    (out / "report.html").unlink()
    shown = "".join(printed(capsys, out).split())  # a long path takes two lines
    assert units.nats(whole["loss"]) in shown and str(out / "model") in shown
    assert len((out / "report.html").read_text()) == len(page)
    assert json.loads(printed(capsys, out, "--json"))["runs"] == [whole]


def test_runs_side_by_side_of_which_one_goes_on(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = settings(folder, text, steps=2, save_every=1, watch_every=0)
    found = compare(given, ["bf16", "int8"], tmp_path, Silent())
    (tmp_path / "int8-seed0" / "result.json").rename(tmp_path / "aside")
    (tmp_path / "report.html").unlink()
    shown = printed(capsys, tmp_path)
    assert "int8, seed 0: at step 2 of 2" in shown
    assert (tmp_path / "report.html").exists()
    (tmp_path / "aside").rename(tmp_path / "int8-seed0" / "result.json")
    remade = remake(tmp_path)
    assert (remade["gaps"], remade["runs"], remade["going"]) == (found["gaps"], found["runs"], [])
    shown = printed(capsys, tmp_path)
    assert "beside" in shown and "int8" in shown and "at step" not in shown
    # Before the comparison wrote its result the order is that in which the runs began.
    (tmp_path / "result.json").unlink()
    assert remake(tmp_path)["gaps"] == found["gaps"]


def test_what_has_nothing_to_show_is_said(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Killed):
        run(settings(folder, text, watch_every=0), tmp_path / "out", KilledAfter(1))
    for place, said in ((tmp_path / "out", "bf16, seed 0: step 0"), (tmp_path, "bf16, seed 0: step 0")):
        assert main(["report", str(place)]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 2
    assert "give a folder that parco train or parco fit made" in capsys.readouterr().err
    (tmp_path / "empty" / "result.json").write_text("{}")
    assert main(["report", str(tmp_path / "empty")]) == 2
    assert "is of no fit" in capsys.readouterr().err
