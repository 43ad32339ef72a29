"""cross_entropy_: every kernel against fp64, its ends, and its laws."""

from typing import Any

import pytest
import torch
from tests.kernels.rowwise.test_rowwise import FLOATS, inputs, usable
from tests.laws.kernel_laws import KernelLaws
from torch import Tensor
from torch.nn import functional

from parco import machine
from parco.kernels import table
from parco.kernels.rowwise import cross_entropy_


def exact(logits: Tensor, labels: Tensor, softcap: float, smoothing: float) -> tuple[Tensor, Tensor]:
    """Losses and their derivatives in fp64, by PyTorch; labels below 0 are ignored."""
    z = logits.double().requires_grad_()
    capped = softcap * torch.tanh(z / softcap) if softcap else z
    target = labels.where(labels >= 0, -100)
    losses = functional.cross_entropy(capped, target, reduction="none", label_smoothing=smoothing)
    return losses.detach(), torch.autograd.grad(losses.sum(), z)[0]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("softcap", "smoothing"), [(0.0, 0.0), (2.5, 0.0), (0.0, 0.2), (30.0, 0.1)])
@pytest.mark.parametrize("columns", [1, 7, 16, 37, 5003])
def test_every_kernel_against_fp64(columns: int, softcap: float, smoothing: float, dtype: torch.dtype) -> None:
    logits, factors = inputs(6, columns, dtype=dtype) * 4, inputs(6, seed=3)
    labels = torch.tensor([0, columns - 1, columns // 2, -1, columns // 3, 0])
    losses, grad = exact(logits, labels, softcap, smoothing)
    for name, run in usable("cross_entropy_"):
        held = logits.clone()
        found = run(held, labels, None, softcap, smoothing, False, dtype)
        assert torch.equal(held, logits), f"{name}: without a gradient the logits stay"
        # A few units of fp32 of the largest numbers involved, which are some tens.
        assert (found - losses).abs().max() <= 2e-5, name
        assert torch.equal(run(held, labels, factors, softcap, smoothing, True, dtype), found), name
        wanted = grad * factors.double().unsqueeze(1)
        bound = 2e-6 + wanted.abs() * (3e-6 + torch.finfo(dtype).eps / 2 * 1.01)
        assert ((held.double() - wanted).abs() <= bound).all(), name
        assert not held[3].any(), f"{name}: no gradient for what is ignored"


def test_fp32_gradients_are_rounded_to_what_bf16_can_write() -> None:
    logits, labels = inputs(5, 200) * 3, torch.arange(5)
    for name, run in usable("cross_entropy_"):
        exactly, rounded = logits.clone(), logits.clone()
        run(exactly, labels, None, 0.0, 0.0, True, torch.float32)
        run(rounded, labels, None, 0.0, 0.0, True, torch.bfloat16)
        assert torch.equal(rounded, exactly.bfloat16().float()), name


def test_large_logits_and_what_is_not_finite() -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[1e4, 9e3, -1e4], [-inf, 0.0, 1.0], [nan, 0.0, 1.0], [0.0, 1.0, nan], [inf, 0.0, 1.0]])
    for name, run in usable("cross_entropy_"):
        held = logits.clone()
        losses = run(held, torch.tensor([1, 2, 0, 0, 1]), None, 0.0, 0.0, True, torch.float32)
        assert losses[0] == 1000, name
        torch.testing.assert_close(losses[1], torch.tensor(0.31326166), msg=name)
        assert losses[2:].isnan().all(), name
        assert held[2:].isnan().any(1).all(), name
        assert held[1, 0].abs() < 1e-30, name
        assert run(logits.clone(), torch.tensor([0] * 5), None, 0.0, 0.0, True, torch.float32)[1] == inf, name


def test_results_do_not_depend_on_the_threads() -> None:
    logits, labels = inputs(300, 1000), torch.arange(300)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            held = logits.clone()
            results.append((cross_entropy_(held, labels), held))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_no_rows() -> None:
    assert cross_entropy_(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)).shape == (0,)


LABELS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 3).double(), LABELS), TypeError, "logits is torch.float64"),
        ((torch.zeros(2, 0), LABELS), ValueError, "at least one column"),
        ((torch.zeros(3, 2).T, LABELS), ValueError, "contiguous"),
        ((torch.zeros(2, 3), LABELS.int()), TypeError, "labels are torch.int32"),
        ((torch.zeros(3, 3), LABELS), ValueError, "labels have the shape"),
        ((torch.zeros(2, 3), LABELS, torch.zeros(2).half()), TypeError, "factors are torch.float16"),
        ((torch.zeros(2, 3), LABELS, None, -1.0), ValueError, "softcap=-1.0"),
        ((torch.zeros(2, 3), LABELS, None, 0.0, 2.0), ValueError, "smoothing=2.0"),
        ((torch.zeros(2, 3).half(), LABELS, None, 0.0, 0.0, True, torch.bfloat16), TypeError, "rounded=torch.bfloat16"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cross_entropy_(*arguments)


class TestCrossEntropy(KernelLaws):
    operation = "cross_entropy_"

    @pytest.fixture(params=[(torch.float32, torch.bfloat16, 0.0), (torch.bfloat16, torch.bfloat16, 3.0)], ids=str)
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        dtype, rounded, softcap = request.param
        return inputs(4, 50, dtype=dtype), torch.tensor([3, -1, 49, 0]), inputs(4), softcap, 0.1, True, rounded

    def test_every_usable_kernel_returns_what_the_reference_does(self, call: tuple[Any, ...]) -> None:
        """As of every operation, with logits of each kernel's own, into which it writes."""
        operation = table.operations()[self.operation]
        kernels = [k for k in operation.kernels if k.isa == table.TORCH or k.isa in machine.detect().isas]
        assert len(kernels) > 1
        results = []
        for kernel in kernels:
            logits = call[0].clone()
            results.append((kernel.run(logits, *call[1:]), logits))
        for found in results[:-1]:
            for mine, wanted in zip(found, results[-1], strict=True):
                torch.testing.assert_close(mine, wanted)
