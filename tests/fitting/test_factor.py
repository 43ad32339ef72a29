"""Low-rank factors: the optimum, and that it is the optimum of the outputs."""

import pytest
import torch
from torch import Tensor

from parco.fitting import factor
from parco.fitting.factor import basis, factorize, fisher_factors, rank_for, refit_left, scaled_factors
from parco.fitting.randomized import leading
from parco.fitting.statistics import Statistics, row_error

SHAPES = [(40, 96), (96, 40), (64, 64)]


def inputs_of(columns: int, tokens: int = 1500) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    return torch.randn(tokens, columns, generator=generator) @ mix * torch.logspace(1, -1, columns)


def weights(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02


def total(delta: Tensor, statistics: Statistics) -> float:
    return float(row_error(delta, statistics.gram, 1).double().sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_activation_aware_factors_are_the_optimum(shape: tuple[int, int]) -> None:
    weight, statistics, rank = weights(shape), Statistics.of(inputs_of(shape[1])), 12
    left, right = factorize(weight, rank, statistics)
    root = torch.linalg.cholesky(statistics.gram.double())
    singular = torch.linalg.svdvals(weight.double() @ root)
    optimum = float(singular[rank:].square().sum())
    assert total(weight - left @ right, statistics) == pytest.approx(optimum, rel=1e-3)
    assert left.shape == (shape[0], rank)
    torch.testing.assert_close(left.T @ left, torch.eye(rank), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_energies_are_what_each_direction_costs(shape: tuple[int, int]) -> None:
    weight, statistics = weights(shape), Statistics.of(inputs_of(shape[1]))
    found = basis(weight, statistics)
    for rank in (5, 20):
        left, right = found.factors(rank)
        assert total(weight - left @ right, statistics) == pytest.approx(float(found.energies[rank:].sum()), rel=1e-2)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_statistics_it_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    weight = weights(shape)
    left, right = factorize(weight, 10)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(left @ right, (u[:, :10] * s[:10]) @ v[:10], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_activation_aware_is_no_worse_than_plain(shape: tuple[int, int]) -> None:
    weight, statistics = weights(shape), Statistics.of(inputs_of(shape[1]))
    aware, plain = factorize(weight, 16, statistics), factorize(weight, 16)
    assert total(weight - aware[0] @ aware[1], statistics) < 0.7 * total(weight - plain[0] @ plain[1], statistics)


@pytest.mark.parametrize("shape", SHAPES)
def test_fwsvd_is_the_papers(shape: tuple[int, int]) -> None:
    weight, rank = weights(shape), 12
    fisher = torch.logspace(0, -4, shape[1])[torch.randperm(shape[1], generator=torch.Generator().manual_seed(2))]
    left, right = fisher_factors(weight, rank, Statistics(torch.eye(shape[1]), 1, fisher=fisher))
    importance = torch.diag(fisher.sqrt()).double()
    u, s, v = torch.linalg.svd(weight.double() @ importance, full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(importance)
    torch.testing.assert_close((left @ right).double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_asvd_is_the_papers(shape: tuple[int, int]) -> None:
    weight, rank, inputs = weights(shape), 12, inputs_of(shape[1])
    left, right = scaled_factors(weight, rank, Statistics.of(inputs))
    scale = torch.diag(inputs.abs().mean(0) ** 0.5).double()
    u, s, v = torch.linalg.svd(weight.double() @ scale, full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(scale)
    torch.testing.assert_close((left @ right).double(), expected, rtol=1e-3, atol=1e-5)


def test_each_metric_keeps_more_of_the_outputs_than_the_one_before() -> None:
    weight, statistics = weights((64, 64)), Statistics.of(inputs_of(64))
    factors = [factorize(weight, 16), scaled_factors(weight, 16, statistics), factorize(weight, 16, statistics)]
    plain, scaled, activation = (total(weight - left @ right, statistics) for left, right in factors)
    assert activation < 0.95 * scaled < 0.95 * 0.95 * plain


def test_rows_and_columns_that_are_never_used_can_be_divided_by() -> None:
    weight = weights((40, 64))
    nothing = Statistics(torch.eye(64), 1, magnitude=torch.zeros(64), fisher=torch.zeros(64))
    for factors in (fisher_factors, scaled_factors):
        left, right = factors(weight, 12, nothing)
        torch.testing.assert_close(left @ right, torch.matmul(*factorize(weight, 12)), rtol=1e-3, atol=1e-5)
        with pytest.raises(ValueError, match="the statistics hold no"):
            factors(weight, 12, Statistics(torch.eye(64), 1))


def test_shifted_inputs_reach_the_optimum_of_the_original_outputs() -> None:
    original = inputs_of(48, 3000)
    shifted = original + 0.2 * original.std(0) * torch.randn(original.shape, generator=torch.Generator().manual_seed(3))
    weight, rank = weights((32, 48)), 8
    statistics = Statistics.of(shifted, original)
    left, right = factorize(weight, rank, statistics)
    achieved = (shifted @ (left @ right).T - original @ weight.T).square().sum()
    root = torch.linalg.cholesky(statistics.gram.double())
    assert statistics.cross is not None
    whole = torch.linalg.solve_triangular(root, (weight @ statistics.cross).double().T, upper=False).T
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    best = torch.linalg.solve_triangular(root.T, ((u[:, :rank] * s[:rank]) @ v[:rank]).T, upper=True).T.float()
    optimum = (shifted @ best.T - original @ weight.T).square().sum()
    # The target is damped by 1% of the gram's mean diagonal, the formula of SVD-LLM is not.
    assert float(achieved) == pytest.approx(float(optimum), rel=0.05)


def test_ranks_of_one_matrix_share_the_eigenvectors_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    solve = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(1) or solve(matrix))
    weight, statistics = weights((40, 64)), Statistics.of(inputs_of(64))
    first = factorize(weight, 8, statistics)
    second = factorize(weight, 16, statistics)
    assert len(calls) == 1
    torch.testing.assert_close(first[0], second[0][:, :8])
    weight.mul_(2.0)
    changed = factorize(weight, 8, statistics)
    assert len(calls) == 2
    torch.testing.assert_close(changed[1], 2.0 * first[1], rtol=1e-4, atol=1e-5)
    factorize(weight, 8)
    assert len(calls) == 3, "other statistics, other directions"


def test_small_ranks_of_large_matrices_are_near_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor, "_EXACT_SIDE", 100)
    weight, statistics = weights((160, 200)), Statistics.of(inputs_of(200))
    left, right = factorize(weight, 16, statistics)
    optimum = float(basis(weight, statistics).energies[16:].sum())
    assert total(weight - left @ right, statistics) < 1.005 * optimum


@pytest.mark.parametrize("gram", [True, False])
def test_randomised_directions_say_what_they_leave_out(gram: bool) -> None:
    weight, statistics = weights((160, 200)), Statistics.of(inputs_of(200))
    seen = statistics if gram else Statistics(torch.eye(200), 1)
    found = leading(weight, statistics.gram if gram else None, 16)
    delta = weight - found.directions @ (found.directions.T @ weight)
    assert found.left_out == pytest.approx(total(delta, seen), rel=1e-3)
    assert found.total == pytest.approx(total(weight, seen), rel=1e-4)
    optimum = float(basis(weight, seen).energies[16:].sum())
    assert optimum * (1 - 1e-4) <= found.left_out < 1.01 * optimum
    torch.testing.assert_close(found.directions.T @ found.directions, torch.eye(16), rtol=0, atol=1e-5)
    assert torch.equal(found.directions, leading(weight, statistics.gram if gram else None, 16).directions)


def test_passes_end_when_another_one_gains_nothing() -> None:
    generator = torch.Generator().manual_seed(4)
    narrow = torch.randn(150, 12, generator=generator) @ torch.randn(12, 180, generator=generator)
    few = leading(narrow, None, 12)
    assert few.passes <= 3
    assert few.left_out <= 1e-5 * few.total
    assert leading(torch.randn(150, 180, generator=generator), None, 12).passes > few.passes
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.150"):
        leading(narrow, None, 151)


def test_left_is_refitted_to_the_right_that_is_stored() -> None:
    weight, statistics = weights((40, 64)), Statistics.of(inputs_of(64))
    left, right = factorize(weight, 12, statistics)
    rounded = (right * 4).round() / 4 + 1e-3
    refitted, inner = refit_left(weight, rounded, statistics)
    assert total(weight - refitted @ rounded, statistics) < total(weight - left @ rounded, statistics)
    torch.testing.assert_close(inner.gram, rounded @ statistics.gram @ rounded.T, rtol=1e-3, atol=1e-2)


def test_rank_for_keeps_the_share_of_parameters() -> None:
    assert rank_for(0.5, (2048, 2048)) == 512
    assert rank_for(0.5, (2048, 5632)) == 752
    assert rank_for(0.01, (256, 256)) == 16
    assert rank_for(1.0, (8, 64)) == 8


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.40"):
        factorize(weights((40, 64)), 41)
    with pytest.raises(ValueError, match="64 columns, the statistics have 32"):
        factorize(weights((40, 64)), 4, Statistics.of(inputs_of(32)))


def test_empty_statistics_fall_back_to_the_plain_svd() -> None:
    weight = weights((40, 64))
    empty = Statistics(torch.zeros(64, 64), 0)
    torch.testing.assert_close(factorize(weight, 8, empty)[1], factorize(weight, 8)[1])
