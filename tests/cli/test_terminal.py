from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Generator
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress as Bars

from parco.cli import fit, terminal


@pytest.fixture
def restored_logging() -> Generator[None]:
    loggers = [logging.getLogger(name) for name in (None, "torch")]
    kept = [(logger, logger.handlers, logger.propagate) for logger in loggers]
    yield
    logging.captureWarnings(False)
    for logger, handlers, propagate in kept:
        logger.handlers, logger.propagate = handlers, propagate


def test_away_from_a_terminal_progress_is_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0.0)
    with terminal.progress() as progress:
        progress.stage("calibrate", total=4)
        progress.advance()
        progress.note("window 512")
        progress.stage("solve")
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert lines[0] == "calibrate: 4 steps"
    assert lines[1].startswith("calibrate: 1 of 4, about ")
    assert lines[1].endswith("s left")
    assert lines[2] == "window 512"
    assert [line.partition(":")[0] for line in lines[3:]] == ["calibrate", "solve", "solve"]


def test_progress_lines_are_rare(capsys: pytest.CaptureFixture[str]):
    lines = terminal.Lines()
    lines.stage("measure", total=1000)
    for _ in range(1000):
        lines.advance()
    lines.close()
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_the_time_left_forgets_pauses_and_what_was_done_before(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    now = 1000.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    lines = terminal.Lines()
    lines.stage("train", total=1000, done=900)
    now += 3600.0  # the machine slept
    lines.advance()
    for _ in range(20):
        now += 20.0
        lines.advance(2)
    assert capsys.readouterr().err.splitlines()[-1] == "train: 941 of 1000, about 9 min 50 s left"


def test_a_job_that_goes_on_judges_by_its_own_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    now = 1000.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    lines = terminal.Lines()
    lines.stage("train", total=1000, done=900)
    now += 20.0
    lines.advance(2)
    assert capsys.readouterr().err.splitlines()[-1] == "train: 902 of 1000, about 16 min 20 s left"


def test_a_job_that_is_refused_early_leaves_the_error_alone(capsys: pytest.CaptureFixture[str]):
    def refused() -> None:
        with terminal.progress() as progress:
            progress.stage("load", total=1)
            progress.advance()
            raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        refused()
    assert capsys.readouterr().err == ""


def test_on_a_terminal_every_stage_has_a_bar_that_ends_full():
    bars = Bars(console=Console(file=io.StringIO(), force_terminal=True))
    drawn = terminal.Drawn(bars)
    drawn.advance()
    drawn.stage("calibrate", total=10)
    drawn.advance(3)
    drawn.stage("solve")
    drawn.advance()
    drawn.stage("heal", total=5)
    assert [(task.description, task.completed, task.finished) for task in bars.tasks] == [
        ("calibrate", 10, True),
        ("solve", 1, True),
        ("heal", 0, False),
    ]
    assert [task.fields["time"][-1:] for task in bars.tasks] == ["s", "s", ""]


def test_on_a_terminal_steps_of_a_minute_have_a_time_left_too(monkeypatch: pytest.MonkeyPatch):
    now = 1000.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    bars = Bars(console=Console(file=io.StringIO(), force_terminal=True))
    drawn = terminal.Drawn(bars)
    drawn.stage("train", total=10, done=4)
    for left in ("5 min", "4 min"):
        now += 60.0
        drawn.advance()
        assert bars.tasks[0].fields["time"].startswith(f"about {left}")


def test_warnings_go_to_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], restored_logging: None
):
    monkeypatch.setenv("PARCO_CACHE", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        terminal.quiet_libraries()
        warnings.warn("a library is unhappy", stacklevel=1)
        logging.captureWarnings(False)
    logging.getLogger("somebody").warning("so is another")
    logging.getLogger("torch.utils").warning("and a third")
    log = (tmp_path / "cache" / "log.txt").read_text()
    assert "a library is unhappy" in log
    assert "so is another" in log
    assert log.count("and a third") == 1
    assert capfd.readouterr() == ("", "")


def test_a_cache_that_cannot_be_written_does_not_stop_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored_logging: None
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PARCO_CACHE", str(tmp_path / "file" / "cache"))
    terminal.quiet_libraries()
    assert logging.getLogger().handlers


@pytest.mark.parametrize(
    ("given", "split"),
    [
        (None, None),
        (["int4:64,int8:row"], ["int4:64", "int8:row"]),
        (["int4:64 int8:row", "keep"], ["int4:64", "int8:row", "keep"]),
        (["factor(0.5,metric=plain)>>int4:64, keep"], ["factor(0.5,metric=plain)>>int4:64", "keep"]),
    ],
)
def test_methods_are_separated_by_commas_outside_parentheses(given: list[str] | None, split: list[str] | None):
    assert fit.split_methods(given) == split


def test_results_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]):
    terminal.console().print("experts[3] :smile: [red]1[/red]")
    terminal.print_json({"µ": 1})
    assert capsys.readouterr().out == 'experts[3] :smile: [red]1[/red]\n{\n "µ": 1\n}\n'
    assert not sys.stdout.isatty()
