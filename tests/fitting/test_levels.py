"""GPTQ for formats that are no integers: the same pass, whose decision is the format's nearest number."""

from __future__ import annotations

import pytest
import torch
from tests.fitting.test_gptq import correlated, weights

from parco import formats
from parco.fitting import levels
from parco.fitting.gptq import gptq
from parco.fitting.levels import gptq_levels, rtn_levels
from parco.fitting.scales import searched
from parco.fitting.search import IntegerGrid
from parco.fitting.statistics import Statistics, row_error
from parco.kernels.cast import decode
from parco.weights import Quantized

SHAPE = (40, 150)
NAMES = [
    name
    for name in formats.NAMES
    if IntegerGrid.of(formats.parse(name)) is None
    and not formats.parse(name).is_dense
    and not isinstance(formats.parse(name).scale, formats.ScaleDelayed)
] + ["int4:32x32:asym", "int8:16x16:asym"]


@pytest.mark.parametrize("name", NAMES)
def test_it_errs_less_than_rounding(name: str) -> None:
    # Of a size that formats without scales can write too.
    weight, statistics, spec = weights(*SHAPE) * 40, Statistics.of(correlated(SHAPE[1])), Quantized(name, SHAPE)

    def error(tensors: tuple[torch.Tensor, ...]) -> float:
        return float(row_error(weight - spec.dense(*tensors), statistics.gram, statistics.count).sum())

    cast, nearest = spec.encode(weight), rtn_levels(weight, spec.format, statistics.diagonal)
    plain, ordered = (gptq_levels(weight, statistics, spec.format, 0, ordered=each) for each in (False, True))
    assert error(plain) < 0.8 * min(error(cast), error(nearest))
    assert error(ordered) < 0.95 * error(plain)
    for found in (nearest, plain, ordered):
        assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in cast]


@pytest.mark.parametrize("name", NAMES)
def test_sweeps_only_lower_the_error(name: str) -> None:
    weight, statistics, spec = weights(*SHAPE) * 40, Statistics.of(correlated(SHAPE[1])), Quantized(name, SHAPE)
    errors = [
        row_error(weight - spec.dense(*gptq_levels(weight, statistics, spec.format, sweeps)), statistics.gram, 1).sum()
        for sweeps in (0, 1, 3)
    ]
    assert errors[1] < 0.9 * errors[0] and errors[2] < errors[1]


@pytest.mark.parametrize("name", NAMES)
def test_what_the_pass_decides_is_what_is_stored(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Casting the decided numbers changes none of them, however far compensation carried a value."""
    cast = levels.written
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watched(x: torch.Tensor, form: formats.Format, scales: dict[str, torch.Tensor]):
        seen.append((x, decode(cast(x, form, scales))))
        return cast(x, form, scales)

    monkeypatch.setattr(levels, "written", watched)
    gptq_levels(weights(*SHAPE) * 40, Statistics.of(correlated(SHAPE[1])), formats.parse(name))
    ((decided, stored),) = seen
    torch.testing.assert_close(stored, decided, rtol=1e-6, atol=0)


def test_it_is_the_pass_of_integers_where_the_numbers_are_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics, form = weights(24, 96), Statistics.of(correlated(96)), formats.parse("int4:row")
    codes, scale = gptq_levels(weight, statistics, form, sweeps=0)
    found, grid = searched(weight, form, statistics.root[0].diagonal().square())["scale"], IntegerGrid.of(form)
    assert torch.equal(scale, found)
    assert grid is not None
    monkeypatch.setattr("parco.fitting.gptq.search_scale", lambda *_: (found.T.contiguous(), None))
    solved = gptq(weight, statistics, grid, sweeps=0)
    differing = Quantized(form, (24, 96)).dense(codes, scale) != solved.dense()
    # A value within fp32's error of the middle of two codes may go either way, and then moves later columns of its row.
    assert differing.double().mean() < 0.01


def test_dead_columns_become_zero_and_do_not_widen_scales() -> None:
    inputs, weight = correlated(64), weights(16, 64)
    inputs[:, 5] = 0.0
    weight[:, 5] = 100.0
    spec = Quantized("mxfp4", (16, 64))
    stored = spec.dense(*gptq_levels(weight, Statistics.of(inputs), spec.format))
    assert bool((stored[:, 5] == 0).all())
    assert float((stored - weight)[:, :5].abs().max()) < 0.1
    with pytest.raises(ValueError, match="16 columns, the statistics have 64"):
        gptq_levels(weights(8, 16), Statistics.of(inputs), spec.format)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    weight, statistics, form = weights(2100, 64), Statistics.of(correlated(64)), formats.parse("nvfp4")
    assert statistics.root.ridge > 0
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(gptq_levels(weight, statistics, form))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))
