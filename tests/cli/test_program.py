from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import pytest

from parco import cli, job


def interrupt(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_says_how_to_go_on_without_starting_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(job, "fit", interrupt)
    assert cli.main(["fit", "my model", "--size", "0.3", "--fresh"]) == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith(": parco fit 'my model' --size 0.3")
    monkeypatch.setattr("sys.argv", [".venv/bin/parco"])
    monkeypatch.setenv("PATH", "")
    assert cli.main(["fit"]) == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith(": .venv/bin/parco fit")


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("an invariant does not hold")

    monkeypatch.setattr(job, "fit", broken)
    with pytest.raises(RuntimeError, match="invariant"):
        cli.main(["fit"])


def test_an_error_of_several_lines_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def wrong(*arguments: object, **options: object) -> None:
        raise ValueError("first\n  second")

    monkeypatch.setattr(job, "fit", wrong)
    assert cli.main(["fit"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "parco: first second"


def test_an_error_of_the_system_is_told_without_its_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "the disk is full: nothing was saved to out")

    monkeypatch.setattr(job, "fit", full)
    assert cli.main(["fit"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "parco: the disk is full: nothing was saved to out"


def test_what_is_typed_reaches_the_job(monkeypatch: pytest.MonkeyPatch):
    given: dict[str, object] = {}

    def record(model: str | None, **options: object) -> None:
        given.update(options, model=model)
        raise ValueError("seen")

    monkeypatch.setattr(job, "fit", record)
    cli.main(
        [
            "fit",
            "m",
            "--data",
            "t.txt",
            "--speed",
            "1.5",
            "--methods",
            "int4:64,keep",
            "--heal",
            "0",
            "--out",
            "o",
            "--seed",
            "7",
        ]
    )
    progress = given.pop("progress")
    assert hasattr(progress, "stage")
    assert {key: str(value) for key, value in given.items()} == {
        "model": "m",
        "data": "t.txt",
        "size": "None",
        "speed": "1.5",
        "loss": "None",
        "methods": "['int4:64', 'keep']",
        "heal": "0",
        "out": "o",
        "seed": "7",
        "fresh": "False",
    }


@pytest.mark.parametrize("command", ["fit", "eval", "generate", "explain", "train", "report", "machine"])
def test_every_command_and_option_is_explained(command: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    options = re.findall(r"^  (--[a-z]+)[^\n]*?(?:  +(\S.*)|\n {4,}(\S.*))$", shown, re.MULTILINE)
    assert options
    assert len(options) == len(re.findall(r"^  --", shown, re.MULTILINE))


def test_without_a_command_the_commands_are_listed(capsys: pytest.CaptureFixture[str]):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in ("fit", "eval", "generate", "explain", "machine"))


def test_machine_says_what_it_is_and_what_it_reaches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setenv("PARCO_CACHE", str(tmp_path))
    assert cli.main(["machine", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["isa"] in told["isas"]
    assert told["peaks"]["read_bytes_per_second"] > 0
    assert cli.main(["machine"]) == 0
    shown = capsys.readouterr().out
    assert told["cpu"] in shown
    for line in ("instruction sets", "reads", "int8 multiply-adds"):
        assert f"{line} " in shown
