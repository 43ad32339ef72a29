"""Healing brings the outputs back, adds no byte, never makes the check windows worse, and resumes exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fitting.conftest import EXTENT, Calibrated

from parco.fitting import apply, evaluate, heal
from parco.fitting.latent import CastThrough, IntegerLeaf, LevelLeaf, RoundedLeaf, RoundThrough, Trained, gather, spread
from parco.fitting.methods import parse
from parco.fitting.result import HealRecord
from parco.fitting.size import stored_bytes
from parco.fitting.stages import Progress, Silent, Stages
from parco.nn import StoredWeight, groups
from parco.weights import Quantized

STEPS = 8


def healed(
    calibrated: Calibrated, folder: Path, method: str, progress: Progress | None = None
) -> tuple[Any, HealRecord]:
    told = progress or Silent()
    model, blind = calibrated.model(), parse(method).needs_inputs
    methods = {group.name: "int3:16" if blind and group.kind == "embed" else method for group in groups(model)}
    with Stages(folder, told) as stages:
        apply.apply_(model, methods, calibrated.windows, EXTENT, calibrated.stage, stages.open("apply"), Silent())
        original = calibrated.model()
        teacher = heal.teach(original, calibrated.windows, STEPS, 0, stages.open("teacher"), Silent())
        check = calibrated.windows.check[: EXTENT.check]
        record = heal.heal(model, original, teacher, check, calibrated.stage, STEPS, 0, stages.open("heal"), told)
    return model, record


def coded(model: Any) -> dict[str, torch.Tensor]:
    """The codes of the matrices inside the blocks."""
    return {name: data.clone() for name, data in model.state_dict().items() if ".layers." in name and "codes" in name}


@pytest.mark.parametrize(
    "method",
    [
        "int3:16",
        "int4:32:asym",
        "factor(0.5)>>int8:row",
        "int4:32+factor(rank=16)",
        "factor(0.4)",
        "mxfp4",
        "nf4:48@rtn",
        "ternary",
        "prune(50%)>>int4:row",
        "scale(0.5)>>int3:16",
    ],
)
def test_the_divergence_falls_and_the_bytes_stay(
    calibrated: Calibrated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    # A random model of two blocks in eight steps: the default rates are those of a trained one in twenty.
    monkeypatch.setattr(heal, "RATES", {"low_rank": 5e-3, "scale": 2e-3, "dense": 1e-3})
    model, record = healed(calibrated, tmp_path, method)
    assert record["kl_after"] < record["kl_before"]
    assert [step for step, _ in record["curve"]] == [0, STEPS]
    with Stages(tmp_path, Silent()) as stages:
        unhealed = calibrated.model()
        apply.restore(unhealed, stages.open("apply"))
        assert stored_bytes(model) == stored_bytes(unhealed)
        assert {p.dtype for p in model.parameters()} == {p.dtype for p in unhealed.parameters()}
        before = coded(unhealed)
        heal.restore(unhealed, stages.open("heal"))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(unhealed.named_parameters())[name]), name
    moved = {name for name, codes in coded(model).items() if not torch.equal(codes, before[name])}
    if method in ("int3:16", "mxfp4", "nf4:48@rtn", "ternary"):
        assert moved, "not only norms and kept matrices have learned"
    elif "prune" in method:
        assert not moved
    # What was written back is what was judged.
    check = calibrated.windows.check[: EXTENT.check]
    judged = evaluate.quality(model.float(), check, Silent(), calibrated.model().float())
    assert judged.kl == pytest.approx(record["kl_after"], rel=0.01, abs=1e-5)


def test_an_interrupted_healing_ends_with_the_same_bits(
    calibrated: Calibrated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dies(Silent):
        steps = 0

        def advance(self, n: int = 1) -> None:
            self.steps += n
            if self.steps == 6:
                raise KeyboardInterrupt

    monkeypatch.setattr(heal, "EVERY", 4)
    whole, record = healed(calibrated, tmp_path / "whole", "int3:16")
    with pytest.raises(KeyboardInterrupt):
        healed(calibrated, tmp_path / "parts", "int3:16", Dies())
    resumed, again = healed(calibrated, tmp_path / "parts", "int3:16")
    assert again == record
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, dict(resumed.named_parameters())[name]), name


@pytest.mark.parametrize("text", ["int4:16", "int3:32", "int8:row", "int2:16:asym"])
def test_before_the_first_step_a_leaf_is_what_is_stored(text: str) -> None:
    matrix = torch.randn(24, 40)
    stored = StoredWeight.encode(Quantized(text, (24, 40)), matrix)
    trained = Trained(torch.Generator().manual_seed(0))
    trained.add(stored, matrix)
    (leaf,) = trained.leaves.values()
    assert isinstance(leaf, IntegerLeaf)
    torch.testing.assert_close(leaf.value(), stored.dense())
    before = [tensor.clone() for tensor in stored.tensors()]
    leaf.write_back()
    assert all(torch.equal(a, b) for a, b in zip(before, stored.tensors(), strict=True))


def test_a_leaf_written_back_stores_the_value_that_was_trained() -> None:
    stored = StoredWeight.encode(Quantized("int4:16", (24, 40)), torch.randn(24, 40))
    trained = Trained(torch.Generator().manual_seed(0))
    trained.add(stored, None)
    (leaf,) = trained.leaves.values()
    assert isinstance(leaf, IntegerLeaf)
    with torch.no_grad():
        leaf.left.normal_()
        leaf.factor.normal_(std=0.1)
    value = leaf.value().detach()
    assert not torch.equal(value, stored.dense())
    leaf.write_back()
    torch.testing.assert_close(stored.dense(), value)


LEVELS = ["nf4:64", "ternary", "ternary:row", "nvfp4", "mxfp4", "mxfp6_e3m2", "fp8_e4m3:row", "fp8_e4m3:128x128"]


def leaf_of(stored: StoredWeight, original: torch.Tensor | None) -> RoundedLeaf:
    trained = Trained(torch.Generator().manual_seed(0))
    trained.add(stored, original)
    (leaf,) = trained.leaves.values()
    assert isinstance(leaf, RoundedLeaf)
    return leaf


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("text", [*LEVELS, "fp6_e2m3", "int4:32x32", "fp8_e4m3:128x128:pow2"])
def test_a_leaf_of_other_formats_begins_and_ends_as_what_is_stored(text: str, known: bool) -> None:
    matrix = torch.randn(24, 40)
    stored = StoredWeight(spec := Quantized(text, (24, 40)), spec.encode(matrix))
    # As after GPTQ: not every number is the nearest to the original.
    moved = matrix + 0.3 * torch.randn_like(matrix) if known else None
    leaf, before = leaf_of(stored, moved), [tensor.clone() for tensor in stored.tensors()]
    assert isinstance(leaf, LevelLeaf)
    assert torch.equal(leaf.value(), stored.dense())
    if moved is not None:
        assert float((leaf.latent() - moved).abs().mean()) < float((stored.dense() - moved).abs().mean())
    leaf.write_back()
    assert torch.equal(leaf.value(), stored.dense())
    assert all(torch.equal(a, b) for a, b in zip(before[1:], stored.tensors()[1:], strict=True))
    with torch.no_grad():
        leaf.left.normal_()
        if leaf.factor is not None:
            leaf.factor.normal_(std=0.1)
    value = leaf.value().detach()
    assert not torch.equal(value, stored.dense())
    leaf.write_back()
    assert torch.equal(stored.dense(), value)


def test_scales_of_other_formats_train_where_they_are_floats() -> None:
    trains = {name: leaf_of(StoredWeight.encode(Quantized(name, (8, 64)), torch.randn(8, 64)), None) for name in LEVELS}
    assert {name for name, leaf in trains.items() if leaf.factor is not None} == {
        "nf4:64",
        "ternary",
        "ternary:row",
        "fp8_e4m3:row",
        "fp8_e4m3:128x128",
    }


def test_casts_pass_gradients_within_range_and_teach_their_scales() -> None:
    stored = StoredWeight(
        spec := Quantized("ternary:row", (2, 4)), spec.encode(torch.ones(2, 4), scale=torch.tensor([[0.5], [2.0]]))
    )
    leaf = leaf_of(stored, None)
    latent = torch.tensor([[0.2, 0.6, -0.4, 9.0], [0.5, -1.5, 3.2, 0.0]], requires_grad=True)
    scale = torch.tensor([[0.5], [2.0]], requires_grad=True)
    value = CastThrough.apply(latent, scale, leaf.scales, leaf)
    torch.testing.assert_close(value, torch.tensor([[0.0, 0.5, -0.5, 0.5], [0.0, -2.0, 2.0, 0.0]]))
    value.sum().backward()
    assert latent.grad is not None and scale.grad is not None
    torch.testing.assert_close(latent.grad, torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0]]))
    torch.testing.assert_close(scale.grad, torch.tensor([[-0.4 + 1.0 - 0.2 + 1.0], [-0.25 - 0.25 + 1.0]]))


def test_gradients_are_straight_through_within_range_and_zero_outside() -> None:
    latent = torch.tensor([[0.2, 1.1, -0.4, 9.0]], requires_grad=True)
    scale = torch.tensor([[0.5, 0.25]], requires_grad=True)
    value = RoundThrough.apply(latent, scale, torch.tensor(8.0), 2, 0.0, 15.0)
    torch.testing.assert_close(value, torch.tensor([[0.0, 1.0, -0.5, 1.75]]))
    value.sum().backward()
    assert latent.grad is not None and scale.grad is not None
    torch.testing.assert_close(latent.grad, torch.tensor([[1.0, 1.0, 1.0, 0.0]]))
    # Σ (code − latent / scale), and the code alone where it is clamped.
    torch.testing.assert_close(scale.grad, torch.tensor([[(0 - 0.4) + (2 - 2.2), (-2 + 1.6) + 7]]))


@pytest.mark.parametrize("columns", [32, 40])
def test_gather_is_the_transpose_of_spread(columns: int) -> None:
    a, b = torch.randn(3, -(-columns // 16)), torch.randn(3, columns)
    assert float((spread(a, 16, columns) * b).sum()) == pytest.approx(float((a * gather(b, 16, a)).sum()), rel=1e-4)


def test_no_steps_are_taken_by_default_for_large_models() -> None:
    assert heal.automatic_steps(1_100_000_000) == 0
    assert heal.automatic_steps(10_000_000) > 0


def test_divergence_to_nan_is_an_error(calibrated: Calibrated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heal, "RATES", {"low_rank": float("nan"), "scale": 1.0, "dense": 1.0})
    with pytest.raises(ValueError, match=r"healing diverged at step 1.*--heal 0"):
        healed(calibrated, tmp_path, "int3:16")


def test_a_checkpoint_holds_what_the_optimizer_has_not_met(calibrated: Calibrated, tmp_path: Path) -> None:
    """An expert that no token reached has no gradient, hence no state."""
    seen = torch.nn.Parameter(torch.ones(3))
    unseen = torch.nn.Parameter(torch.ones(2))

    class Patient:
        def __init__(self) -> None:
            self.parameters = [seen, unseen]
            self.groups = [{"params": [seen, unseen], "lr": 0.1, "rate": 0.1}]

        def state(self) -> list[torch.Tensor]:
            return [parameter.detach().clone() for parameter in self.parameters]

        def load(self, values: list[torch.Tensor]) -> None:
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.data.copy_(value)

    def run(stage: Any) -> Any:
        return heal._Run(Patient(), None, torch.zeros(0, 8), stage, 4, stage)  # pyright: ignore

    with Stages(tmp_path, Silent()) as stages:
        stage = stages.open("heal")
        first = run(stage)
        first.best = Patient().state()
        seen.grad = torch.ones(3)
        first.optimizer.step()
        first._checkpoint()
        again = run(stage)
        again.resume()
    assert float(again.optimizer.state[seen]["step"]) == 1
    assert float(again.optimizer.state[unseen]["step"]) == 0
    assert torch.equal(again.optimizer.state[seen]["exp_avg"], first.optimizer.state[seen]["exp_avg"])
