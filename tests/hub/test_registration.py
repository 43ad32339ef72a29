"""`register` takes effect whenever Transformers is imported, before parco or after, and costs nothing while it is
not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.hub import tiny

from parco import hub

HOOKED = """
import sys, parco
assert "transformers" not in sys.modules and "torch._dynamo" not in sys.modules  # which take seconds to import
assert any(type(finder).__module__ == "parco.hub.registration" for finder in sys.meta_path)
parco.hub.register()
import transformers
[hook] = [finder for finder in sys.meta_path if type(finder).__module__ == "parco.hub.registration"]
hook.find_spec("transformers.quantizers.auto", None)  # looking for a module does not use the hook up
assert "transformers.quantizers.auto" not in sys.modules
import transformers.quantizers.auto as auto
assert "parco" in auto.AUTO_QUANTIZER_MAPPING and "parco" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
assert not any(type(finder).__module__ == "parco.hub.registration" for finder in sys.meta_path)
assert auto.__spec__.loader is auto.__loader__ and type(auto.__loader__).__name__ == "SourceFileLoader"
"""
LATE = """
import transformers.quantizers.auto
import parco
parco.hub.register()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub.save(tiny.store(tiny.model("qwen2")), tiny.tokenizer(), tmp_path_factory.mktemp("fitted") / "out")


@pytest.mark.parametrize("order", [HOOKED, LATE], ids=["parco first", "Transformers first"])
def test_import_parco_is_all_that_it_takes(order: str, folder: Path) -> None:
    load = f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    program = f"{order}\nprint(type({load}.lm_head.weight).__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["StoredWeight"]
