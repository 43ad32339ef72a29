"""A plan carried out: what is replaced, what it costs, and that an interrupted run ends with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fitting import small
from tests.fitting.conftest import EXTENT, Calibrated
from torch import nn

from parco.fitting import apply, calibrate, evaluate
from parco.fitting.size import planned_bytes, stored_bytes
from parco.fitting.stages import Silent, Stages
from parco.nn import Linear, StoredWeight, groups

METHODS = {
    "embed": "int8:row",
    "model.layers.0.self_attn.qkv": "int4:32",
    "model.layers.0.mlp.down_proj": "factor(0.5)>>int8:row",
    "model.layers.1.mlp.gate_up": "int4:32+factor(rank=16)",
    "head": "int5:48",
}


def carry_out(
    calibrated: Calibrated, folder: Path, methods: dict[str, str], progress: Any = None
) -> tuple[Any, apply.Applied]:
    model = calibrated.model()
    with Stages(folder, Silent()) as stages:
        stage = stages.open("apply", methods=methods)
        return model, apply.apply_(
            model, methods, calibrated.windows, EXTENT, calibrated.stage, stage, progress or Silent()
        )


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def test_the_named_groups_change_and_no_others(calibrated: Calibrated, tmp_path: Path) -> None:
    model, applied = carry_out(calibrated, tmp_path, METHODS)
    changed = {
        group.name
        for group in groups(model)
        for member in group.members
        if isinstance(model.get_submodule(member), Linear)
    }
    assert changed == set(METHODS) - {"embed"}
    assert stored_bytes(model) == planned_bytes(calibrated.model(), METHODS)
    assert set(applied.errors) == set(METHODS)
    assert all(0 < error < 1 for error in applied.errors.values())
    assert {part.dtype for part in model.modules() if isinstance(part, StoredWeight)} == {torch.bfloat16}


def test_the_divergence_is_that_of_the_model_on_the_check_windows(calibrated: Calibrated, tmp_path: Path) -> None:
    model, applied = carry_out(calibrated, tmp_path, METHODS)
    judged = evaluate.quality(
        model.float(), calibrated.windows.check[: EXTENT.check], Silent(), calibrated.model().float()
    )
    assert applied.kl == pytest.approx(judged.kl, rel=0.02, abs=1e-5)
    assert applied.top1 == pytest.approx(judged.top1, abs=0.05)
    assert applied.kl > 0


def test_keeping_everything_changes_nothing(calibrated: Calibrated, tmp_path: Path) -> None:
    model, applied = carry_out(calibrated, tmp_path, {})
    assert applied.kl == pytest.approx(0.0, abs=1e-5)
    assert applied.top1 > 0.98
    for name, parameter in state(calibrated.model()).items():
        assert torch.equal(parameter, state(model)[name])


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bits(calibrated: Calibrated, tmp_path: Path) -> None:
    class Dies(Silent):
        left = 2

        def advance(self, n: int = 1) -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    whole, applied = carry_out(calibrated, tmp_path / "whole", METHODS)
    with pytest.raises(KeyboardInterrupt):
        carry_out(calibrated, tmp_path / "parts", METHODS, Dies())
    resumed, again = carry_out(calibrated, tmp_path / "parts", METHODS)
    assert again == applied
    fresh = calibrated.model()
    with Stages(tmp_path / "parts", Silent()) as stages:
        apply.restore(fresh, stages.open("apply", methods=METHODS))
    for name, parameter in state(whole).items():
        assert torch.equal(parameter, state(resumed)[name]), name
        assert torch.equal(parameter, state(fresh)[name]), name


@pytest.mark.parametrize(("architecture", "changes"), [
    ("gpt2", {"n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 32, "tie_word_embeddings": True}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 56}),
    ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 56, "sliding_window": 8}),
])  # fmt: skip
def test_tied_embeddings_and_experts(
    architecture: str, changes: dict[str, Any], calibrated: Calibrated, tmp_path: Path
) -> None:
    def fresh() -> Any:
        return small.model(architecture, **changes)

    methods = {group.name: "int6:48" for group in groups(fresh()) if group.kind != "router"}
    with Stages(tmp_path, Silent()) as stages:
        stage = stages.open("calibrate")
        calibrate.calibrate(fresh(), calibrated.windows, EXTENT, 0, stage, Silent())
        model = fresh()
        applied = apply.apply_(model, methods, calibrated.windows, EXTENT, stage, stages.open("apply"), Silent())
    assert 0 < applied.kl < 0.1
    assert stored_bytes(model) == planned_bytes(fresh(), methods)
