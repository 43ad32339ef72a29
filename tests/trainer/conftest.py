"""A tiny model's folder and a text, which every run of these tests trains on."""

from pathlib import Path

import pytest
from tests.hub import tiny

LINES = 400


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text("".join(f"{tiny.SENTENCES[i % 3]}\n    return {i * i % 97}\n" for i in range(LINES)))
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(
        tmp_path_factory.mktemp("model") / "tiny",
        hidden_size=64,
        num_attention_heads=4,
        head_dim=16,
        intermediate_size=96,
    )
