"""What holds for every test: no network, no use of the person's own cache, and the same examples in every run."""

import os

# Before anything imports Transformers, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Before torch is loaded: a thread that spins while it waits takes a busy machine's core from the one that it waits for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

# Before anything imports Triton, which reads it once: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

hypothesis.settings.register_profile("parco", deadline=None, derandomize=True)
hypothesis.settings.load_profile("parco")


@pytest.fixture(autouse=True, scope="session")
def _own_cache() -> Iterator[None]:
    """Measurements of this session stay in it; processes that tests start inherit the folder."""
    with tempfile.TemporaryDirectory(prefix="parco-tests-") as folder:
        before = os.environ.get("PARCO_CACHE")
        os.environ["PARCO_CACHE"] = folder
        yield
        if before is None:
            del os.environ["PARCO_CACHE"]
        else:
            os.environ["PARCO_CACHE"] = before


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the clone."""
    return Path(__file__).parent.parent
