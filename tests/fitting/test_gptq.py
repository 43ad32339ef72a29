"""Rounding to integers: the scale search, GPTQ with coordinate descent, and what they promise."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from parco.fitting import gptq as solver
from parco.fitting.gptq import Integers, gptq, rtn
from parco.fitting.search import IntegerGrid, reciprocal, search_scale
from parco.fitting.statistics import Statistics, row_error
from parco.formats import parse
from parco.kernels.cast import decode, encode

FORMATS = [
    "int2:32",
    "int3:64",
    "int4:32",
    "int4:32:asym",
    "int2:32:asym",
    "int6:128",
    "int8:row",
    "int4:row",
    "int8:tensor",
]


def correlated(columns: int, tokens: int = 2048, seed: int = 0) -> Tensor:
    """Inputs [tokens, columns] with the correlations and uneven channels of a language model's activations."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    strength = torch.logspace(0, -1.5, columns)
    channels = torch.exp(0.5 * torch.randn(columns, generator=generator))
    return torch.randn(tokens, columns, generator=generator) * strength @ mix * channels


def weights(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def grid_of(name: str) -> IntegerGrid:
    grid = IntegerGrid.of(parse(name))
    assert grid is not None
    return grid


def error(weight: Tensor, solved: Integers, statistics: Statistics) -> float:
    return float(row_error(weight - solved.dense(), statistics.gram, statistics.count).sum())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(48, 128), (33, 100)])
def test_gptq_errs_less_than_rounding_to_nearest(name: str, shape: tuple[int, int]) -> None:
    weight, statistics, grid = weights(*shape), Statistics.of(correlated(shape[1])), grid_of(name)
    nearest = error(weight, rtn(weight, grid, statistics.diagonal), statistics)
    once = error(weight, gptq(weight, statistics, grid, sweeps=0), statistics)
    swept = error(weight, gptq(weight, statistics, grid, sweeps=2), statistics)
    assert once < 0.8 * nearest
    assert swept < once


@pytest.mark.parametrize("name", FORMATS)
def test_codes_lie_in_the_format(name: str) -> None:
    grid = grid_of(name)
    solved = gptq(weights(20, 70), Statistics.of(correlated(70)), grid)
    assert solved.codes.dtype == torch.uint8
    assert int(solved.codes.max()) < 2**grid.bits
    if grid.bits == 8:
        assert int(solved.codes.min()) >= 1
    assert torch.equal(solved.scale, solved.scale.to(grid.scale_dtype).float())


def classic_gptq(weight: Tensor, gram: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """GPTQ as published: the upper Cholesky factor of the inverse Hessian updates the columns that remain."""
    work, hessian = weight.double().clone(), gram.double().clone()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    codes = torch.zeros_like(work)
    for column in range(work.shape[1]):
        codes[:, column] = (work[:, column] / scale[:, 0]).round().clamp(low, high)
        rest = (work[:, column] - codes[:, column] * scale[:, 0]) / upper[column, column]
        work[:, column:] -= rest[:, None] * upper[column, column:]
    return codes


def test_feedback_without_an_inverse_equals_gptq_as_published() -> None:
    weight, statistics, grid = weights(24, 96), Statistics.of(correlated(96)), grid_of("int4:row")
    solved = gptq(weight, statistics, grid, sweeps=0)
    expected = classic_gptq(weight, statistics.gram, solved.scale.double(), grid.low, grid.high)
    differing = (solved.codes.double() - grid.centre != expected).double().mean()
    # A value within fp32's error of the middle of two codes may go either way, and then moves later columns of its row.
    assert differing < 0.01


def test_activation_order_is_gptq_as_published_with_the_columns_sorted() -> None:
    weight, statistics, grid = weights(24, 96), Statistics.of(correlated(96)), grid_of("int4:row")
    order = statistics.gram.diagonal().argsort(descending=True)
    assert not torch.equal(order, torch.arange(96))
    solved = gptq(weight, statistics, grid, sweeps=0, ordered=True)
    gram = statistics.gram[order][:, order]
    expected = classic_gptq(weight[:, order], gram, solved.scale.double(), grid.low, grid.high)
    assert (solved.codes.double()[:, order] - grid.centre != expected).double().mean() < 0.01


@pytest.mark.parametrize("name", ["int2:32", "int3:64", "int4:32:asym", "int4:row", "int8:tensor"])
def test_activation_order_makes_up_for_the_errors_of_large_inputs(name: str) -> None:
    weight, statistics, grid = weights(48, 200), Statistics.of(correlated(200)), grid_of(name)
    plain = error(weight, gptq(weight, statistics, grid), statistics)
    ordered = gptq(weight, statistics, grid, ordered=True)
    assert error(weight, ordered, statistics) < 0.95 * plain
    assert ordered.scale.shape == gptq(weight, statistics, grid).scale.shape, "nothing more is stored"


@pytest.mark.parametrize("name", ["int2:32", "int4:64", "int4:32:asym"])
def test_scales_are_chosen_by_what_the_pass_over_their_group_leaves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics, grid = weights(48, 192), Statistics.of(correlated(192)), grid_of(name)
    tried = error(weight, gptq(weight, statistics, grid, sweeps=0), statistics)
    monkeypatch.setattr(solver, "MULTIPLES", (1.0,))
    assert tried < 0.97 * error(weight, gptq(weight, statistics, grid, sweeps=0), statistics)


def test_every_sweep_lowers_the_damped_error() -> None:
    weight, statistics, grid = weights(40, 128), Statistics.of(correlated(128)), grid_of("int3:32")
    damped = statistics.gram + statistics.root.ridge * torch.eye(128)
    errors = [row_error(weight - gptq(weight, statistics, grid, sweeps=count).dense(), damped, 1) for count in range(4)]
    for before, after in pairwise(errors):
        assert bool((after <= before * (1 + 1e-4)).all()), "the error of no row grows"


def test_sweeps_carry_over_to_tokens_that_were_not_seen() -> None:
    weight, statistics, grid = weights(40, 96), Statistics.of(correlated(96)), grid_of("int3:32")
    tokens = correlated(96, tokens=6144)[2048:]
    other = Statistics(tokens.T @ tokens, len(tokens))
    assert error(weight, gptq(weight, statistics, grid), other) < error(
        weight, gptq(weight, statistics, grid, 0), other
    )


def test_dead_columns_become_zero_and_free_their_scales() -> None:
    inputs = correlated(64)
    inputs[:, 5] = 0.0
    weight = weights(16, 64)
    weight[:, 5] = 100.0
    for name in ("int4:32", "int4:32:asym"):
        solved = gptq(weight, Statistics.of(inputs), grid_of(name)).dense()
        assert bool((solved[:, 5] == 0).all())
        assert float((solved - weight)[:, :5].abs().max()) < 0.1


def test_the_given_weight_is_not_changed() -> None:
    inputs = correlated(32)
    inputs[:, 3] = 0.0
    for rows in (1, 8):
        weight = weights(rows, 32)
        before = weight.clone()
        gptq(weight, Statistics.of(inputs), grid_of("int4:32"))
        assert torch.equal(weight, before)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    weight, statistics = weights(2100, 96), Statistics.of(correlated(96))
    assert statistics.root.ridge > 0
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(gptq(weight, statistics, grid_of("int4:32")))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(found[0].codes, other.codes)
        assert torch.equal(found[0].scale, other.scale)


def test_shifted_inputs_aim_at_the_original_outputs() -> None:
    original = correlated(96, 4096)
    shifted = original + 0.3 * original.std() * torch.randn(original.shape, generator=torch.Generator().manual_seed(5))
    weight, grid = weights(40, 96), grid_of("int4:32")
    aware = gptq(weight, Statistics.of(shifted, original=original), grid).dense()
    blind = gptq(weight, Statistics.of(shifted), grid).dense()
    wanted = original @ weight.T
    assert (shifted @ aware.T - wanted).square().sum() < 0.9 * (shifted @ blind.T - wanted).square().sum()


@pytest.mark.parametrize("name", ["int2:32", "int3:32", "int4:32", "int5:64", "int4:32:asym", "int8:row"])
def test_searched_scales_are_no_worse_than_absmax(name: str) -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(3))
    plain = (decode(encode(weight, name)) - weight).square().sum()
    searched = (rtn(weight, grid_of(name)).dense() - weight).square().sum()
    gained = {2: 0.35, 3: 0.6, 4: 0.8}.get(grid_of(name).bits, 1.0)
    assert searched <= (0.95 if "asym" in name else gained) * plain


def test_importance_moves_error_to_the_columns_that_matter_less() -> None:
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(4))
    importance = torch.ones(32)
    importance[:4] = 100.0
    even = (rtn(weight, grid_of("int3:32")).dense() - weight).square()
    weighted = (rtn(weight, grid_of("int3:32"), importance).dense() - weight).square()
    assert weighted[:, :4].sum() < 0.7 * even[:, :4].sum()
    assert (weighted * importance).sum() < (even * importance).sum()


def test_the_extra_negative_code_serves_either_sign() -> None:
    values = torch.tensor([[[-2.0, 2.0], [1.0, -1.0], [0.0, 0.0], [-1.0, 1.0]]])
    scale, _ = search_scale(values, None, grid_of("int2:32"))
    assert torch.equal(scale, torch.tensor([[1.0, -1.0]])), "exactly representable either way, with opposite scales"


def test_zero_groups_have_scale_zero() -> None:
    scale, _ = search_scale(torch.zeros(2, 32, 3), None, grid_of("int4:32"))
    assert torch.equal(scale, torch.zeros(2, 3))
    assert torch.equal(reciprocal(scale), torch.zeros(2, 3))
    assert torch.equal(rtn(torch.zeros(3, 40), grid_of("int4:32")).dense(), torch.zeros(3, 40))


@pytest.mark.parametrize("name", ["nf4:64", "mxfp4", "fp8_e4m3:row", "ternary", "bf16", "nvfp4"])
def test_other_formats_have_no_integer_grid(name: str) -> None:
    assert IntegerGrid.of(parse(name)) is None


def test_ill_conditioned_grams_are_damped_until_they_factor() -> None:
    direction = torch.randn(1, 64, generator=torch.Generator().manual_seed(6))
    statistics = Statistics.of(direction.repeat(10, 1) * 1e4)
    solved = gptq(weights(8, 64), statistics, grid_of("int4:32"))
    assert bool(torch.isfinite(solved.dense()).all())


def test_statistics_refuse_what_they_cannot_mean() -> None:
    with pytest.raises(ValueError, match="square"):
        Statistics(torch.zeros(3, 4), 1)
    with pytest.raises(ValueError, match="float32 or float64"):
        Statistics(torch.zeros(3, 3, dtype=torch.bfloat16), 1)
    with pytest.raises(ValueError, match="gram holds NaN"):
        Statistics(torch.full((3, 3), torch.nan), 1)
    with pytest.raises(ValueError, match="cross"):
        Statistics(torch.eye(3), 1, cross=torch.eye(4))
    with pytest.raises(ValueError, match="columns"):
        gptq(weights(4, 32), Statistics.of(correlated(16)), grid_of("int4:32"))
    with pytest.raises(ValueError, match="without tokens"):
        _ = Statistics(torch.zeros(3, 3), 0).root


def test_statistics_add_up() -> None:
    inputs, original = correlated(24), correlated(24, seed=9)
    whole = Statistics.of(inputs, original)
    parts = Statistics.of(inputs[:500], original[:500]) + Statistics.of(inputs[500:], original[500:])
    assert parts.count == whole.count
    assert parts.cross is not None
    torch.testing.assert_close(parts.gram, whole.gram, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(parts.cross, whole.cross, rtol=1e-4, atol=1e-3)


def test_row_error_is_the_mean_squared_output_error() -> None:
    inputs, delta = correlated(40), weights(9, 40)
    statistics = Statistics.of(inputs)
    expected = (inputs @ delta.T).square().mean(0)
    torch.testing.assert_close(row_error(delta, statistics.gram, statistics.count), expected, rtol=1e-3, atol=1e-9)


def test_the_target_is_the_least_squares_layer_on_shifted_inputs() -> None:
    original = correlated(32, 4096)
    shifted = original @ (torch.eye(32) + 0.1 * torch.randn(32, 32, generator=torch.Generator().manual_seed(2)))
    statistics = Statistics.of(shifted, original)
    weight = weights(12, 32)
    target = statistics.target(weight)
    wanted = original @ weight.T
    assert (shifted @ target.T - wanted).square().sum() < 0.3 * (shifted @ weight.T - wanted).square().sum()
    assert Statistics.of(shifted).target(weight) is weight
    same = Statistics.of(shifted, shifted).target(weight)
    torch.testing.assert_close(same, weight, rtol=1e-4, atol=1e-5)


def test_solvers_run_in_inference_mode() -> None:
    weight, inputs = weights(16, 32), correlated(32)
    expected = gptq(weight, Statistics.of(inputs), grid_of("int3:32"))
    with torch.inference_mode():
        found = gptq(weight.clone(), Statistics.of(inputs.clone()), grid_of("int3:32"))
    assert torch.equal(found.codes, expected.codes)


def test_an_error_in_one_chunk_is_raised() -> None:
    weight = weights(3000, 8)
    statistics = Statistics.of(correlated(8))
    _ = statistics.root
    statistics.__dict__["root"] = statistics.root._replace(factor=torch.zeros(4, 4))
    threads = torch.get_num_threads()
    with pytest.raises((RuntimeError, IndexError)):
        gptq(weight, statistics, grid_of("int8:row"))
    assert torch.get_num_threads() == threads
