"""Texts as windows: nothing is lost, changed or doubled, and what is broken is named."""

from pathlib import Path

import pytest
from tests.hub import tiny

from parco.fitting.stages import Silent
from parco.trainer import windows
from parco.trainer.windows import PIECE, collate, split


class Told(Silent):
    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None:
        self.stages.append(name)


def test_windows_are_the_text_of_one_document_after_the_other(tmp_path: Path) -> None:
    texts = {"b.txt": "def fit(model, size):\r\n    return model\n" * 40, "a/c.txt": "import torch\n" * 30, "d.txt": ""}
    for name, content in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content.encode())
    tokenizer = tiny.tokenizer()
    found, _ = windows.windows([tmp_path], tokenizer, 32, Silent())
    wanted = [
        token
        for name in ("a/c.txt", "b.txt")
        for token in [*tokenizer(texts[name])["input_ids"], tokenizer.eos_token_id]
    ]
    assert len(wanted) % 32, "a remainder is dropped"
    got = [row["input_ids"].tolist() for row in found]
    assert [token for row in got for token in row] == wanted[: len(wanted) // 32 * 32]
    assert [int(row["window"]) for row in found] == list(range(len(got)))
    batch = collate([found[1], found[0]])
    assert batch["labels"].tolist() == [got[1], got[0]] and batch["window"].tolist() == [1, 0]


def test_a_file_longer_than_one_piece_is_the_same_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PIECE > 1000
    monkeypatch.setattr(windows, "PIECE", 100)
    content = "\n\n    é = 1\nfor a, b in pairs.items():\n" * 50 + "x" * 500
    (tmp_path / "t.txt").write_text(content)
    pieces = list(windows._pieces(tmp_path / "t.txt"))
    assert "".join(pieces) == content
    assert len(pieces) > 10
    assert all(piece[:1].isalpha() for piece in pieces[1:])


def test_tokens_are_made_once_for_a_text_a_tokenizer_and_a_length(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("class Weight:\n" * 99)
    told = Told()
    digests = [windows.windows([path], tiny.tokenizer(), length, told)[1] for length in (16, 16, 8)]
    assert told.stages == ["tokens", "tokens"]
    assert digests[0] == digests[1] != digests[2]
    path.write_text("class Weight:\n" * 98)
    assert windows.windows([path], tiny.tokenizer(), 16, told)[1] != digests[0]


def test_the_end_of_a_text_is_held_out(text: Path) -> None:
    whole, _ = windows.windows([text], tiny.tokenizer(), 16, Silent())
    own = split([text], None, tiny.tokenizer(), 16, Silent())
    assert len(own.held) == round(0.05 * len(whole)) and len(own.train) == len(whole) - len(own.held)
    assert own.held[0]["window"] == len(own.train)
    other = split([text], text, tiny.tokenizer(), 16, Silent())
    assert len(other.train) == len(other.held) == len(whole)
    assert other.digest != own.digest


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 9)
    (tmp_path / "far.txt").write_bytes("é".encode() * 20000 + b"\xe9 ")
    (tmp_path / "short.txt").write_text("def")
    (tmp_path / "none").mkdir()
    (tmp_path / "empty.txt").touch()
    for name, error, words in (
        ("latin.txt", ValueError, "latin.txt is not UTF-8 text: byte 3"),
        ("far.txt", ValueError, "far.txt is not UTF-8 text: byte 40000"),
        ("short.txt", ValueError, "shorter than one window of 16 tokens"),
        ("none", ValueError, "a folder without files"),
        ("absent", FileNotFoundError, "--data names no file"),
        ("empty.txt", ValueError, "empty.txt is empty"),
    ):
        with pytest.raises(error, match=words):
            split([tmp_path / name], None, tiny.tokenizer(), 16, Silent())
    (tmp_path / "one.txt").write_text("import torch\n" * 3)
    with pytest.raises(ValueError, match="at least 2 are needed"):
        split([tmp_path / "one.txt"], None, tiny.tokenizer(), 10, Silent())
