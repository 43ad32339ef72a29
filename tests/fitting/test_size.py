"""Sizes are those of the files: what hub.save writes is at most what a plan was said to take, and hardly less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.fitting import small

import parco
from parco import hub
from parco.fitting.size import checkpoint_bytes, planned_bytes, stored_bytes
from parco.nn import groups

MODELS = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {"n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 32}),
    "gpt_oss": (
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 56, "sliding_window": 8},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 56}),
}
SLACK = 12
"""Bytes a tensor by which a size may exceed the file: offsets count ten digits each, of which a small file needs four.
"""


def written(model: Any, folder: Path) -> tuple[int, int]:
    """Bytes of the model's one safetensors file, and the number of tensors in it."""
    hub.save(model, small.tokenizer(), folder)
    (file,) = folder.glob("*.safetensors")
    with file.open("rb") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
    return file.stat().st_size, header.count(b"data_offsets")


def close(said: int, file: tuple[int, int]) -> bool:
    size, tensors = file
    return size <= said <= size + SLACK * tensors + 120


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["int8:row", "int4:32", "factor(0.5)>>int8:row", "joint(0.5)>>int8:row"])
def test_a_plans_bytes_are_those_of_the_file(name: str, method: str, tmp_path: Path) -> None:
    architecture, changes = MODELS[name]
    model = small.model(architecture, **changes)
    whole = checkpoint_bytes(model)
    assert stored_bytes(model) == whole
    if name != "mixtral":  # Transformers itself saves experts one by one
        model.save_pretrained(tmp_path / "plain")
        (file,) = (tmp_path / "plain").glob("*.safetensors")
        assert file.stat().st_size <= whole <= file.stat().st_size + 3_000

    chosen = [group.name for group in groups(model) if group.kind not in ("router", "embed", "head")]
    said = planned_bytes(model, dict.fromkeys(chosen, method))
    members = {member for group in groups(model) if group.name in chosen for member in group.members}
    parco.convert_(model, method, lambda module, path: path in members)
    assert stored_bytes(model) == said
    assert close(said, written(model, tmp_path / "fitted"))
    assert checkpoint_bytes(model) == whole
    assert checkpoint_bytes(hub.load(tmp_path / "fitted").model) == whole


def test_a_tied_matrix_counts_once() -> None:
    apart, tied = small.model(), small.model(tie_word_embeddings=True)
    saved = checkpoint_bytes(apart) - checkpoint_bytes(tied)
    assert 0 <= saved - 2 * small.VOCABULARY * 48 < 120
    methods = {group.name: "int8:row" for group in groups(tied) if group.kind in ("embed", "head")}
    assert methods
    said = planned_bytes(tied, methods)
    parco.convert_(tied, "int8:row", lambda module, path: path in ("model.embed_tokens", "lm_head"))
    assert stored_bytes(tied) == said
