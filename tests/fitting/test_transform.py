"""Other coordinates for the inputs: what they are, and what they bring where inputs are uneven."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.fitting import small
from tests.fitting.conftest import EXTENT, Calibrated
from torch import Tensor
from transformers import AutoModelForCausalLM

import parco
from parco import hub
from parco.fitting import apply
from parco.fitting.candidates import considered
from parco.fitting.methods import Scale, output_error, parse
from parco.fitting.stages import Silent, Stages
from parco.fitting.statistics import Statistics
from parco.kernels.cast import turned
from parco.nn import StoredWeight, groups
from parco.products import Activations
from parco.weights import Scaled


def uneven(columns: int, tokens: int = 1500, seed: int = 0) -> Tensor:
    """Inputs of which some channels are ten to thirty times as large as the others, as in language models."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) @ mix
    x[:, ::16] *= torch.linspace(10, 30, len(range(0, columns, 16)))
    return x


def weights(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.02


def error(text: str, weight: Tensor, statistics: Statistics) -> float:
    return float(output_error(weight, *parse(text)(weight, statistics), statistics).sum())


def test_divided_statistics_are_those_of_the_divided_inputs() -> None:
    inputs, scale = uneven(64), torch.rand(64) + 0.5
    original = uneven(64, seed=2)
    found, wanted = Statistics.of(inputs, original).divided(scale), Statistics.of(inputs / scale, original / scale)
    for name in ("gram", "cross", "magnitude", "peak"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-4, atol=1e-2)
    fisher = torch.rand(64)
    seen = Statistics(torch.eye(64), 1, fisher=fisher).divided(scale).fisher
    # The gradient with respect to W · diag(s) is that with respect to W divided by s.
    torch.testing.assert_close(seen, fisher / scale**2)


def test_turned_statistics_are_those_of_the_turned_inputs() -> None:
    inputs, original = uneven(200), uneven(200, seed=2)
    found = Statistics.of(inputs, original).turned(3)
    wanted = Statistics.of(turned(inputs, 3), turned(original, 3))
    for name in ("gram", "cross"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-3, atol=0.5)
    assert found.magnitude is found.peak is found.fisher is None


def test_a_rotation_spreads_the_outliers_of_rows() -> None:
    weight = weights(64, 128)
    weight[:, 5] *= 30
    statistics = Statistics.of(torch.randn(1500, 128, generator=torch.Generator().manual_seed(6)))
    for name in ("int4:128@rtn", "int8:row@rtn", "int3:64@rtn"):
        assert error(f"rotate>>{name}", weight, statistics) < 0.6 * error(name, weight, statistics)
    one, other = parse("rotate(1)>>int4:64"), parse("rotate(2)>>int4:64")
    assert not torch.equal(one(weight)[1][0], other(weight)[1][0])


def test_a_rotation_lets_activations_be_int8() -> None:
    weight, x = weights(64, 128), uneven(128, 64, seed=7)
    wanted = x @ weight.T

    def apart(text: str) -> float:
        spec, tensors = parse(text)(weight)
        return float((spec.apply(x, *tensors, product=Activations()) - wanted).square().mean())

    assert apart("rotate>>int8:row") < 0.5 * apart("int8:row")


def test_statistics_add_their_peaks_up_to_the_greater() -> None:
    one, two = uneven(32, 50), uneven(32, 70, seed=3)
    both = (Statistics.of(one) + Statistics.of(two)).peak
    assert both is not None
    assert torch.equal(both, torch.cat([one, two]).abs().amax(0))


@pytest.mark.parametrize("rule", ["awq", "smoothquant"])
def test_scales_follow_the_papers(rule: str) -> None:
    inputs, weight = uneven(64), weights(48, 64)
    spec, tensors = parse(f"scale(0.7,rule={rule})>>int8:row")(weight, Statistics.of(inputs))
    assert isinstance(spec, Scaled)
    if rule == "awq":
        wanted = inputs.abs().mean(0) ** 0.7
    else:
        wanted = inputs.abs().amax(0) ** 0.7 / weight.abs().amax(0) ** 0.3
    ratio = tensors[-1][0].float() * wanted
    torch.testing.assert_close(ratio, ratio.mean().expand(64), rtol=2**-7, atol=0.0)  # rounded to bf16
    torch.testing.assert_close(spec.dense(*tensors), weight, rtol=0.1, atol=0.02)


def test_awq_scaling_errs_less_than_rounding_and_never_more() -> None:
    weight, statistics = weights(64, 128), Statistics.of(uneven(128))
    for name in ("int3:128@rtn", "int4:64@rtn", "mxfp4"):
        assert error(f"scale>>{name}", weight, statistics) < 0.9 * error(name, weight, statistics)
    even = Statistics.of(torch.randn(1500, 128, generator=torch.Generator().manual_seed(5)))
    assert error("scale>>int4:64@rtn", weight, even) < 1.02 * error("int4:64@rtn", weight, even)


def test_the_searched_exponent_is_the_best_of_those_tried() -> None:
    weight, statistics = weights(64, 128), Statistics.of(uneven(128))
    fixed = [error(f"scale({step / 10:g})>>int4:64@rtn", weight, statistics) for step in range(11)]
    assert error("scale>>int4:64@rtn", weight, statistics) == pytest.approx(min(fixed), rel=1e-6)
    assert 0 < fixed.index(min(fixed)) < 10


def test_smoothquant_lets_activations_be_int8() -> None:
    inputs, weight = uneven(128), weights(64, 128)
    statistics, x = Statistics.of(inputs), uneven(128, 64, seed=7)
    wanted = x @ weight.T

    def apart(text: str) -> float:
        spec, tensors = parse(text)(weight, statistics)
        return float((spec.apply(x, *tensors, product=Activations()) - wanted).square().mean())

    assert apart("scale(rule=smoothquant)>>int8:row@rtn") < 0.25 * apart("int8:row@rtn")


def test_a_correction_under_a_scale_errs_less_than_either() -> None:
    weight, statistics = weights(64, 128), Statistics.of(uneven(128))
    both = error("scale>>int3:64@rtn+factor(rank=16,metric=plain)", weight, statistics)
    assert both < 0.8 * error("int3:64@rtn+factor(rank=16,metric=plain)", weight, statistics)
    assert both < 0.8 * error("scale>>int3:64@rtn", weight, statistics)


def test_an_expert_that_no_token_reached_is_scaled_by_ones() -> None:
    weight = weights(16, 64)
    spec, tensors = parse("scale>>int4:32")(weight, Statistics(torch.zeros(64, 64), 0))
    assert torch.equal(tensors[-1], torch.ones(1, 64, dtype=torch.bfloat16))
    plain = parse("int4:32")(weight)
    assert torch.equal(spec.dense(*tensors), plain[0].dense(*plain[1]))


def test_scales_stay_within_half_precision() -> None:
    inputs = uneven(64)
    inputs[:, 3] = 0.0
    inputs[:, 5] *= 1e6
    for text in ("scale(1)>>int8:row", "scale(0.9,rule=smoothquant)>>int8:row"):
        scale = parse(text)(weights(16, 64), Statistics.of(inputs))[1][-1].float()
        assert bool((scale > 1e-3).all() and (scale < 1e3).all())


def test_sizes_that_were_not_seen_are_asked_for() -> None:
    with pytest.raises(ValueError, match="no sizes of the inputs"):
        Scale(0.5)(weights(8, 16), Statistics(torch.eye(16), 4))


def test_scaled_models_are_applied_saved_and_loaded(calibrated: Calibrated, tmp_path: Path) -> None:
    model = calibrated.model()
    chosen = {"qkv": "scale>>int3:16", "down": "scale(0.5)>>int4:16+factor(rank=8)", "gate_up": "int4:16@actorder"}
    methods = {group.name: chosen[group.kind] for group in groups(model) if group.kind in chosen}
    with Stages(tmp_path / "stages", Silent()) as stages:
        stage = stages.open("apply", methods=methods)
        applied = apply.apply_(model, methods, calibrated.windows, EXTENT, calibrated.stage, stage, Silent())
    assert set(applied.errors) == set(methods)
    assert 0 < applied.kl < 1
    hub.save(model, small.tokenizer(), tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto").eval()
    kinds = [type(part.spec) for part in loaded.modules() if isinstance(part, StoredWeight)]
    assert kinds.count(Scaled) == 2 * 4
    tokens = torch.arange(3, 30)[None]
    with torch.no_grad():
        before, again = model(tokens).logits, loaded(tokens).logits
        parco.fuse_(loaded)
        fused = loaded(tokens).logits
    torch.testing.assert_close(again, before, rtol=0.05, atol=0.05)
    torch.testing.assert_close(fused, before, rtol=0.1, atol=0.1)


def test_what_needs_inputs_is_no_candidate_for_rows_that_are_looked_up(calibrated: Calibrated) -> None:
    model = calibrated.model()
    for group in groups(model):
        asked = ["keep", "scale>>int4:16", "int4:16@actorder", "int4:16"]
        assert considered(model, group, asked) == (["keep", "int4:16"] if group.kind == "embed" else asked)
