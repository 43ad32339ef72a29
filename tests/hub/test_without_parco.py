"""A fitted folder is refused by Transformers alone, with a table that says what to do; it never comes up with random
weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.hub import tiny

from parco import hub

LOADER = """
import json, sys, transformers
assert "parco" not in sys.modules
outcome = {}
for folder in sys.argv[1:]:
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
        outcome[folder] = "loaded"
    except Exception as error:
        outcome[folder] = f"{type(error).__name__}: {error}"
assert "parco" not in sys.modules
print(json.dumps(outcome))
"""
CASES = {
    "untied": ("llama", "int4:32", "int8:row"),
    "only the blocks": ("llama", "int4:32", None),
    "tied": ("qwen2", "int4:32", "int8:row"),
    "only a tied embedding": ("qwen2", None, "int8:row"),
    "gpt2": ("gpt2", "int4:32", "int8:row"),
    "mixtral": ("mixtral", "int4:32", None),
    "gpt-oss": ("gpt_oss", "int4:32", None),
    "experts": ("qwen3_moe", "int4:32", "int8:row"),
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], str]:
    root = tmp_path_factory.mktemp("fitted")
    folders: dict[str, Path] = {}
    for case, (architecture, format, embeddings) in CASES.items():
        made = tiny.store(tiny.model(architecture), format, embeddings)
        folders[case] = hub.save(made, tiny.tokenizer(), root / case.replace(" ", "_"))
    command = [sys.executable, "-c", LOADER, *map(str, folders.values())]
    # As a person's own process is: another test in this one may have asked Transformers to be quiet.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS_")}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root, env=environment)
    assert run.returncode == 0, run.stderr
    by_folder = json.loads(run.stdout.splitlines()[-1])
    return {case: by_folder[str(folder)] for case, folder in folders.items()}, run.stderr


@pytest.mark.parametrize("case", CASES)
def test_transformers_alone_refuses(outcome: tuple[dict[str, str], str], case: str) -> None:
    assert outcome[0][case].startswith("RuntimeError"), outcome[0][case]


def test_the_table_says_what_to_do(outcome: tuple[dict[str, str], str]) -> None:
    assert outcome[1].count("saved_by_parco.import_parco_before_loading_this") >= len(CASES)
