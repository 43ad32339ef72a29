"""A fit whose candidates have zeros: what it makes is healed, saved and loaded, and it is never slower than dense."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import parco
from parco.fitting import evaluate, measure, table
from parco.fitting.methods import parse
from parco.fitting.plan import Option
from parco.fitting.result import Result
from parco.nn import StoredWeight
from parco.weights import Sparse, Weight

METHODS = ("prune(2:4)", "prune(50%)>>int8:row", "prune(block:16)", "prune(75%)+factor(rank=16)")


def fit(folder: Path, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch, sparse: float) -> Result:
    """A fit with kernels of made-up speed: a sparse one takes `sparse` times what its bytes would let it take."""

    def time_shape(shape: tuple[int, int], kinds: Mapping[str, Weight | None], *_: Any) -> dict[str, float]:
        dense = 2 * shape[0] * shape[1]
        return {
            key: 1e-9 * (dense if spec is None else spec.nbytes * (sparse if _has_zeros(spec) else 1.0))
            for key, spec in kinds.items()
        }

    monkeypatch.setattr(evaluate, "peak_memory", lambda _: 1 << 20)
    monkeypatch.setattr(measure, "_time_shape", time_shape)
    monkeypatch.setenv("PARCO_CACHE", str(out.parent / f"cache-{sparse}"))
    parco.fit(folder, data=text, size=0.8, out=out, methods=METHODS, heal=4, seed=1)
    return json.loads((out / "result.json").read_text())


def _has_zeros(spec: Weight) -> bool:
    return isinstance(spec, Sparse) or any(map(_has_zeros, spec.parts().values()))


def test_pruned_models_are_healed_saved_and_loaded(
    small_folder: Path, small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = fit(small_folder, small_text, tmp_path / "fitted", monkeypatch, 0.5)
    methods = {row["method"] for row in result["groups"]}
    assert methods & set(METHODS), "the budget needs zeros, and here they are fast"
    assert result["fitted"]["fraction"] <= 0.8
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fitted", dtype="auto").eval()
    stored = {name: part for name, part in model.named_modules() if isinstance(part, StoredWeight)}
    sparse = {name: part for name, part in stored.items() if isinstance(part.spec, Sparse)}
    assert sparse
    for part in sparse.values():
        assert float((part.dense() == 0).float().mean()) >= 0.3, "healing leaves the zeros where they are"
    assert result["heal"] is not None
    assert result["heal"]["kl_after"] <= result["heal"]["kl_before"]
    tokens = torch.arange(3, 30)[None]
    with torch.no_grad():
        logits = model(tokens).logits
    assert bool(torch.isfinite(logits).all())


def test_zeros_that_are_slower_than_dense_are_tried_and_never_chosen() -> None:
    keep, slow = Option("keep", 100, 0.0, 1.0, 1.0), Option("prune(2:4)", 60, 0.01, 1.1, 1.0)
    fast, few = Option("prune(50%)>>int8:row", 40, 0.02, 0.9, 1.1), Option("int4:32", 30, 0.03, 1.5, 1.0)
    beside = Option("prune(50%)+factor(rank=16)", 70, 0.02, 1.3, 1.0)
    assert table.offered({"a": [keep, slow, fast, few, beside]}) == {"a": [keep, fast, few]}
    assert "decodes" in table.reason(slow, keep)
    assert not parse("int4:32").leaves_out
    thin, joint = Option("factor(0.5)>>int8:row", 25, 0.04, 1.2, 1.0), Option("joint(0.5)", 45, 0.02, 0.8, 1.0)
    corrected = Option("int4:32+factor(rank=16)", 35, 0.02, 1.4, 1.0)
    assert table.offered({"a": [keep, thin, joint, corrected]}) == {"a": [keep, joint, corrected]}
