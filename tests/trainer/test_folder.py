"""Whose folder a run's is: what changed since it began is refused, or told."""

from pathlib import Path

import pytest

from parco.fitting.stages import Silent
from parco.trainer import folder

DEFAULTS = {"new": 5, "later": 7}


class Told(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_run_that_goes_on_elsewhere_is_told(tmp_path: Path) -> None:
    told = Told()
    for ranks in (2, 2, 1):
        with folder.taken(
            tmp_path, {"lr": 1.0, "new": 5}, DEFAULTS, {"text": "a"}, {}, ranks, resume=True, progress=told
        ):
            assert folder.has_run(tmp_path)
            with (
                pytest.raises(ValueError, match="another process trains in --out"),
                folder.taken(
                    tmp_path, {"lr": 1.0, "new": 5}, DEFAULTS, {"text": "a"}, {}, ranks, resume=True, progress=told
                ),
            ):
                pass
    assert told.notes == ["the run began with ranks 2: from here on its bits may be others"]
    known = {"lr": 1.0, "new": 5, "later": 7}
    folder.check(known, DEFAULTS, tmp_path, resume=True)  # what the run does not know had its default
    with pytest.raises(ValueError, match="--later was 7"):
        folder.check(known | {"later": 8}, DEFAULTS, tmp_path, resume=True)
    for settings, made_of, resume, words in (
        ({"lr": 2.0}, {"text": "a"}, True, "--lr was 1.0"),
        ({"lr": 1.0, "new": 6}, {"text": "a"}, True, "--new was 5"),
        ({"lr": 1.0}, {"text": "b"}, True, "whose text has changed since"),
        ({"lr": 1.0}, {"text": "a"}, False, "--resume goes on with it"),
    ):
        with (
            pytest.raises((ValueError, FileExistsError), match=words),
            folder.taken(tmp_path, settings, DEFAULTS, made_of, {}, 2, resume=resume, progress=told),
        ):
            pass
