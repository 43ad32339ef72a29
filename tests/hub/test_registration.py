"""`register` takes effect whenever Transformers is imported, before or after, and costs nothing while it is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from parco import hub
from tests.hub import tiny

PROGRAMS = {
    "before Transformers": "import parco; import transformers",
    "after Transformers": "import transformers; import parco",
    "after its quantizers": "import transformers.quantizers.auto; import parco",
    "twice": "import parco; parco.hub.register(); import transformers; parco.hub.register()",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub.save(tiny.store(tiny.model("qwen2")), tiny.tokenizer(), tmp_path_factory.mktemp("fitted") / "out")


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("order", PROGRAMS)
def test_from_pretrained_after_import_parco(order: str, folder: Path) -> None:
    load = f"model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    assert run(f"{PROGRAMS[order]}\n{load}\nprint(type(model.lm_head.weight).__name__)") == "StoredWeight"


def test_import_parco_imports_no_transformers() -> None:
    assert run("import sys, parco; print('transformers' in sys.modules, hasattr(parco, 'hub'))") == "False True"


def test_the_import_hook_leaves_when_it_has_done_its_work() -> None:
    program = """
import sys, parco
assert any(type(finder).__module__ == "parco.hub.registration" for finder in sys.meta_path)
import transformers.quantizers.auto as auto
assert "parco" in auto.AUTO_QUANTIZER_MAPPING and "parco" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
assert not any(type(finder).__module__ == "parco.hub.registration" for finder in sys.meta_path)
print(auto.__spec__.loader is auto.__loader__, type(auto.__loader__).__name__)
"""
    assert run(program) == "True SourceFileLoader"
