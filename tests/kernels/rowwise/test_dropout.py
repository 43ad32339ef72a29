"""dropout: the bits of the reference on every instruction set, as Philox says, and a derivative with the same mask."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.kernels.rowwise.test_rowwise import FLOATS, inputs, usable
from tests.laws.kernel_laws import KernelLaws
from torch import Tensor

from parco.kernels.cast import random_bits
from parco.kernels.rowwise import dropout


def seeded(number: int) -> Tensor:
    return torch.tensor([number])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (5, 1), (3, 37), (2, 3, 64), (4, 131), (2, 768), (0, 4), (4, 0)], ids=str)
def test_every_kernel_drops_what_philox_says(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = inputs(*shape, dtype=dtype, seed=3)
    rows, columns = x.numel() // max(1, shape[-1]), shape[-1]
    for seed, p in ((7, 0.1), (-3, 0.75), (1 << 62, 2.0**-30)):
        bits = random_bits(seed % (1 << 64), range(max(1, rows)), max(1, columns))[:rows, :columns]
        dropped = (bits < int(p * 2**32)).reshape(shape)
        expected = torch.where(dropped, 0.0, x.float() * torch.tensor(1 / (1 - p))).to(dtype)
        assert torch.equal(dropout(x, seeded(seed), p), expected)
        for name, run in usable("dropout"):
            if x.numel() or name.endswith("torch"):
                assert torch.equal(run(x, seeded(seed), p), expected), (name, seed, p)
    assert torch.equal(dropout(x, seeded(7), 0.0), x)
    assert dropout(torch.ones(()), seeded(7), 0.5) in (0, 2)
    assert torch.equal(dropout(x, seeded(7), 1.0), torch.zeros_like(x))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_infinities_and_nans_that_are_dropped_are_zero(dtype: torch.dtype) -> None:
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 3e4]).repeat(3, 50).to(dtype)
    dropped = dropout(torch.ones_like(x), seeded(5), 0.5) == 0
    for name, run in usable("dropout"):
        y = run(x, seeded(5), 0.5)
        assert torch.equal(y[dropped], torch.zeros_like(y[dropped])), name
        torch.testing.assert_close(y[~dropped], x[~dropped] * 2, rtol=0, atol=0, equal_nan=True)
    assert not dropout(x, seeded(5), 1.0).any()


def test_it_is_unbiased_and_other_seeds_drop_others() -> None:
    ones = torch.ones(512, 1000)
    found = [dropout(ones, seeded(seed), 0.3) for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1])
    # Two masks agree on 0.3² + 0.7² = 0.58 of 512,000 numbers, of standard deviation 0.0007: six of them.
    assert abs(float((found[1] == found[2]).float().mean()) - 0.58) < 0.0042
    for mask in found[1:]:
        # The means of a row and of a column have deviations of 0.65 over the root of 1000 and of 512: six of them.
        assert (mask.mean(1) - 1).abs().max() < 0.125
        assert (mask.mean(0) - 1).abs().max() < 0.175


def test_results_depend_on_neither_threads_nor_layout() -> None:
    x = inputs(300, 700)
    threads = torch.get_num_threads()
    results, flat = [dropout(x.t().contiguous().t(), seeded(3), 0.2)], []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results += [dropout(x, seeded(3), 0.2), dropout(x.reshape(30, 10, 700), seeded(3), 0.2).reshape(300, 700)]
            flat.append(dropout(x.reshape(-1), seeded(3), 0.2))  # one row, with a mask of its own
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(each, group[0]) for group in (results, flat) for each in group[1:])


def test_derivatives_are_the_mask_as_often_as_wanted() -> None:
    x, grad = inputs(9, 50).requires_grad_(), inputs(9, 50, seed=4).requires_grad_()
    y = dropout(x, seeded(9), 0.4)
    factors = dropout(torch.ones(9, 50), seeded(9), 0.4)
    (found,) = torch.autograd.grad(y, x, grad, create_graph=True)
    assert torch.equal(found, grad * factors)
    (twice,) = torch.autograd.grad(found.sum(), grad)
    assert torch.equal(twice, factors)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: sizes.append(kept.numel()) or kept, lambda kept: kept):
        dropout(x, seeded(9), 0.4)
    assert sizes == [1]


def test_it_compiles_whole() -> None:
    x, seed = inputs(4, 40).requires_grad_(), seeded(8)

    def doubled(x: Tensor, seed: Tensor) -> Tensor:
        return dropout(x * 2, seed, 0.5)

    compiled = torch.compile(doubled, backend="aot_eager", fullgraph=True)
    found, expected = (torch.autograd.grad(run(x, seed).square().sum(), x) for run in (compiled, doubled))
    assert torch.equal(*found, *expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: dropout(x, seeded(0), 1.5), ValueError, "p is 1.5; a share"),
        (lambda x: dropout(x, seeded(0), float("nan")), ValueError, "p is nan; a share"),
        (lambda x: dropout(x, torch.zeros(2, dtype=torch.int64), 0.5), ValueError, "seed has the shape"),
        (lambda x: dropout(x, torch.zeros(1), 0.5), TypeError, "seed is torch.float32"),
        (lambda x: dropout(x.double(), seeded(0), 0.5), TypeError, "x is torch.float64"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 8))


class TestDropout(KernelLaws):
    operation = "dropout"

    @pytest.fixture(params=[(torch.float32, 0.1), (torch.bfloat16, 0.5), (torch.float16, 0.0)], ids=str)
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        dtype, p = request.param
        return inputs(3, 4, 50, dtype=dtype).requires_grad_(), seeded(11), p

    def assert_agrees(self, found: Tensor, expected: Tensor, call: tuple[Any, ...], name: str) -> None:
        assert torch.equal(found, expected), name
