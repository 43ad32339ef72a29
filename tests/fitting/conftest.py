"""The small model loaded, its windows, and one calibration that several tests read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.fitting import small

from parco import hub
from parco.fitting import calibrate, texts
from parco.fitting.stages import Silent, Stage, Stages

EXTENT = calibrate.Extent(8, 4, 2)


@dataclass
class Calibrated:
    """A model's folder, what it saw, and the stage that holds it."""

    folder: Path
    windows: texts.Windows
    stages: Stages
    stage: Stage

    def model(self) -> Any:
        """A fresh copy."""
        return hub.load(self.folder).model


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.folder(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(small.text())
    return path


@pytest.fixture(scope="session")
def calibrated(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calibrated]:
    loaded = hub.load(small_folder)
    windows = texts.own_text(loaded.tokenizer, small.text(), "text", texts.window_length(loaded.model))
    with Stages(tmp_path_factory.mktemp("stages"), Silent()) as stages:
        stage = stages.open("calibrate")
        calibrate.calibrate(loaded.model, windows, EXTENT, 0, stage, Silent())
        yield Calibrated(small_folder, windows, stages, stage)
