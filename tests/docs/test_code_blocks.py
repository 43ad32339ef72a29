"""Every code block of README.md and of the documentation runs, in the order of its page.

Each page gets a folder of its own with what a reader is told to bring: `my-model`, a small checkpoint, `my-text.txt`,
and on a page that has no command to make it `fitted/result.json`. Python blocks of a page share their names; a console
block's commands run in the same folder, and output shown under a command must be what it prints (`...` stands for
anything). `make` commands are only looked up: the continuous integration runs them.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.docs.page import ROOT, Page
from tests.report import example
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import parco.hub

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class CodeBlock:
    language: str
    line: int
    body: str


def blocks(page: Path) -> list[CodeBlock]:
    text = page.read_text()
    return [
        CodeBlock(found["language"], text.count("\n", 0, found.start()) + 1, found["body"])
        for found in FENCE.finditer(text)
    ]


def runnable(page: Path) -> list[CodeBlock]:
    return [block for block in blocks(page) if block.language in ("python", "console")]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two blocks with the tokenizer that ships with parco."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(parco.hub.embedded_path())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("pages") / "my-model"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prepare(page: Path, folder: Path, model_folder: Path) -> None:
    """Puts what a reader of the page is told to bring into the folder."""
    (folder / "my-model").symlink_to(model_folder)
    (folder / "my-text.txt").write_text((parco.hub.embedded_path() / "heldout.txt").read_text()[:24_000])
    if "--out fitted" not in page.read_text():
        (folder / "fitted").mkdir()
        (folder / "fitted" / "result.json").write_text(json.dumps(example.result()))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if runnable(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_every_code_block_runs(page: Path, model_folder: Path, tmp_path: Path) -> None:
    prepare(page, tmp_path, model_folder)
    running = Page(tmp_path)
    run = {"python": running.python, "console": running.console}
    for block in runnable(page):
        complaint = run[block.language](block.body, f"{page.relative_to(ROOT)}:{block.line}")
        assert complaint is None, complaint
    running.close()


def test_every_code_block_is_of_a_language_that_is_looked_at() -> None:
    unknown = {(page.name, block.line, block.language) for page in PAGES for block in blocks(page)}
    assert {entry for entry in unknown if entry[2] not in ("python", "console", "text", "json")} == set()


def test_readme_shows_what_it_must() -> None:
    commands = "\n".join(block.body for block in runnable(ROOT / "README.md") if block.language == "console")
    for needed in ("make fit", "make test", "parco fit"):
        assert f"$ {needed}" in commands
