"""linear_cross_entropy against fp64, and that the logits are never whole."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from parco.kernels import loss
from parco.kernels.loss import linear_cross_entropy
from parco.nn import LinearCrossEntropy

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def inputs(*shape: int, dtype: torch.dtype = F32, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(leaves: list[Tensor], labels: Tensor, softcap: float | None = None, **options: Any) -> Tensor:
    """In fp64 by PyTorch."""
    x, weight, bias = leaves
    z = functional.linear(x, weight, bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return functional.cross_entropy(z, labels, **options)


def both(
    x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, **options: Any
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Loss and gradients, ours and those of fp64."""
    results = []
    for dtype in (None, torch.float64):
        leaves = [each.detach().to(dtype or each.dtype).requires_grad_() for each in (x, weight, bias)]
        made = linear_cross_entropy(leaves[0], leaves[1], labels, leaves[2], **options) if dtype is None else None
        made = exact(leaves, labels, **options) if made is None else made
        grad = inputs(*made.shape, seed=9).to(made.dtype) + 1
        results.append((made.detach(), *torch.autograd.grad(made, leaves, grad)))
    return results[0], results[1]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 2.0}, {"label_smoothing": 0.1}, {"ignore_index": 0, "softcap": 5.0, "label_smoothing": 0.3}],
    ids=str,
)
@pytest.mark.parametrize(("rows", "columns", "vocabulary"), [(1, 3, 2), (37, 20, 1003), (700, 9, 13), (130, 16, 1)])
def test_fp32_against_fp64(rows: int, columns: int, vocabulary: int, options: dict[str, Any], reduction: str) -> None:
    x, weight, bias = inputs(rows, columns), inputs(vocabulary, columns, seed=3), inputs(vocabulary, seed=4)
    labels = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(5))
    labels[2::3] = options.get("ignore_index", -100)
    if options.get("ignore_index") == 0 and vocabulary == 1:
        return  # nothing counts: the test below
    found, wanted = both(x, weight, bias, labels, reduction=reduction, **options)
    for mine, true in zip(found, wanted, strict=True):
        assert mine.dtype == F32
        # Up to 700 terms summed in fp32.
        assert (mine.double() - true).abs().max() <= 3e-6 * (1 + true.abs().max())


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("few", [False, True])
def test_16_bits_against_fp64(dtype: torch.dtype, few: bool) -> None:
    """Operands that 16 bits write exactly: what is rounded are the derivative of the logits and the results."""
    x, weight, bias = inputs(90, 24, dtype=dtype), inputs(301, 24, dtype=dtype, seed=3), inputs(301, dtype=dtype)
    labels = torch.randint(0, 301, (90,), generator=torch.Generator().manual_seed(5))
    labels[(slice(10, None) if few else slice(0, 3))] = -100
    found, wanted = both(x, weight, bias, labels)
    assert found[0].dtype == F32
    assert (found[0] - wanted[0]).abs() < 1e-5
    for mine, true in zip(found[1:], wanted[1:], strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - true).norm() <= 3 * torch.finfo(dtype).eps * true.norm()
        assert mine[3:10].any()


def test_autocast_says_how_it_multiplies_and_arguments_of_fp32_keep_fp32_gradients() -> None:
    x, weight = inputs(50, 16).requires_grad_(), inputs(99, 16, seed=3).requires_grad_()
    labels = torch.arange(50)
    with torch.autocast("cpu", BF16):
        made = linear_cross_entropy(x, weight, labels)
    again = linear_cross_entropy(x, weight, labels, dtype=BF16)
    rounded = linear_cross_entropy(x.bfloat16(), weight.bfloat16(), labels)
    assert made.dtype == F32
    assert torch.equal(made, again)
    assert torch.equal(made, rounded)
    assert not torch.equal(made, linear_cross_entropy(x, weight, labels))
    assert [each.dtype for each in torch.autograd.grad(made, (x, weight))] == [F32, F32]


@pytest.mark.parametrize("rows", [0, 6])
def test_where_nothing_counts(rows: int) -> None:
    x, weight = inputs(rows, 4).requires_grad_(), inputs(7, 4).requires_grad_()
    labels = torch.full((rows,), -100)
    made = linear_cross_entropy(x, weight, labels)
    assert made.isnan()  # as PyTorch's
    assert not any(each.any() for each in torch.autograd.grad(made, (x, weight)))
    assert linear_cross_entropy(x, weight, labels, reduction="sum") == 0
    assert linear_cross_entropy(x, weight, labels, divisor=5) == 0
    assert torch.equal(linear_cross_entropy(x, weight, labels, reduction="none"), torch.zeros(rows))


def test_a_divisor_takes_the_place_of_the_count() -> None:
    x, weight, labels = inputs(2, 5, 4).requires_grad_(), inputs(7, 4), torch.randint(0, 7, (2, 5))
    whole = linear_cross_entropy(x, weight, labels, reduction="sum")
    for divisor in (20, 20.0, torch.tensor(20)):
        made = linear_cross_entropy(x, weight, labels, divisor=divisor)
        torch.testing.assert_close(made, whole / 20)
        (grad,) = torch.autograd.grad(made, x)
        torch.testing.assert_close(grad * 20, torch.autograd.grad(whole, x, retain_graph=True)[0])
    rows = linear_cross_entropy(x, weight, labels, reduction="none")
    assert rows.shape == (2, 5)
    torch.testing.assert_close(rows.sum(), whole)


def test_only_wanted_gradients_and_backward_twice() -> None:
    x, weight, labels = inputs(9, 4).requires_grad_(), inputs(7, 4), torch.arange(9) % 7
    made = linear_cross_entropy(x, weight, labels)
    (first,) = torch.autograd.grad(made, x, retain_graph=True)
    kept = first.clone()
    first.zero_()  # whoever got it may do so
    (second,) = torch.autograd.grad(made * 3, x)
    torch.testing.assert_close(second, 3 * kept)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, weight, labels), made)


def test_nan_reaches_loss_and_gradients() -> None:
    x, weight = inputs(9, 4), inputs(7, 4).requires_grad_()
    x[3, 2] = float("nan")
    made = linear_cross_entropy(x, weight, torch.arange(9) % 7)
    assert made.isnan()
    assert torch.autograd.grad(made, weight)[0].isnan().any()


class Largest(TorchDispatchMode):
    """Watches for the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, Tensor):
                self.numbers = max(self.numbers, each.numel())
        return made


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_logits_are_never_whole(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "NUMBERS_AT_ONCE", 64 * 2000)
    x, weight = inputs(640, 8).requires_grad_(), inputs(2000, 8).requires_grad_()
    labels = torch.randint(0, 2000, (640,))
    kept: list[int] = []
    with (
        Largest() as largest,
        torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (kept.append(tensor.numel()), tensor)[1], lambda tensor: tensor
        ),
    ):
        linear_cross_entropy(x, weight, labels, reduction=reduction).sum().backward()
    assert largest.numbers == 64 * 2000
    assert max(kept) <= weight.numel()


def test_rows_that_do_not_count_are_not_computed() -> None:
    x, weight, labels = inputs(4096, 8).requires_grad_(), inputs(2000, 8), torch.full((4096,), -100)
    labels[7::100] = 3
    with Largest() as largest:
        linear_cross_entropy(x, weight, labels).backward()
    assert largest.numbers <= 41 * 2000
    assert (x.grad.abs().sum(1) > 0).equal(labels == 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": inputs(3, 4).double()}, TypeError, "x is torch.float64"),
        ({"x": inputs(3, 5)}, ValueError, "x has the shape"),
        ({"weight": inputs(4)}, ValueError, "weight has the shape"),
        ({"bias": inputs(5)}, ValueError, "bias has the shape"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, TypeError, "labels are torch.int32"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, ValueError, "labels have the shape"),
        ({"labels": torch.tensor([0, 7, 1])}, ValueError, "labels contain 7; columns are 0 to 5, and -100 is ignored"),
        ({"labels": torch.tensor([0, -1, 1])}, ValueError, "labels contain -1"),
        ({"softcap": 0.0}, ValueError, "softcap=0.0"),
        ({"softcap": math.nan}, ValueError, "softcap=nan"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing=1.5"),
        ({"reduction": "max"}, ValueError, "reduction='max'"),
        ({"divisor": 3, "reduction": "sum"}, ValueError, "divisor=3"),
        ({"dtype": torch.int8}, TypeError, "dtype is torch.int8"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": inputs(3, 4), "weight": inputs(6, 4), "labels": torch.zeros(3, dtype=torch.int64)} | change
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments)


def test_the_module_holds_a_weight_or_takes_one() -> None:
    x, labels = inputs(9, 4), torch.arange(9) % 7
    held = LinearCrossEntropy(4, 7, bias=True, label_smoothing=0.1)
    assert set(held.state_dict()) == {"weight", "bias"}
    taking = LinearCrossEntropy(label_smoothing=0.1)
    assert not taking.state_dict()
    wanted = functional.cross_entropy(functional.linear(x, held.weight, held.bias), labels, label_smoothing=0.1)
    torch.testing.assert_close(held(x, labels), wanted)
    torch.testing.assert_close(taking(x, labels, held.weight, held.bias), wanted)
    held(x, labels, divisor=4).backward()
    assert held.weight.grad.shape == (7, 4)
    assert "4, 7, bias=True" in repr(held)
    with pytest.raises(ValueError, match="given none"):
        taking(x, labels)
    with pytest.raises(ValueError, match="holds one"):
        held(x, labels, held.weight)
    with pytest.raises(ValueError, match="out_features=None"):
        LinearCrossEntropy(4)


def test_compiled_by_torch_it_gives_the_same() -> None:
    module, x, labels = LinearCrossEntropy(4, 7), inputs(9, 4), torch.arange(9) % 7
    compiled = torch.compile(lambda x: module(x * 2, labels) + 1, backend="aot_eager")
    assert torch.equal(compiled(x), module(x * 2, labels) + 1)


def test_a_loss_scale_keeps_small_gradients_within_fp16() -> None:
    rows, columns, vocabulary, scale = 256, 32, 64, 2.0**16
    labels = torch.randint(vocabulary, (rows,))
    x = (torch.randn(rows, columns) / 64).half().requires_grad_()
    weight = (torch.randn(vocabulary, columns) / 4096).half().requires_grad_()
    (linear_cross_entropy(x, weight, labels) * scale).backward()
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    (torch.nn.functional.cross_entropy(wide[0] @ wide[1].T, labels) * scale).backward()
    assert x.grad is not None and weight.grad is not None
    assert x.grad.dtype == torch.float16
    assert wide[0].grad.abs().max() / scale < 2.0**-17, "in fp16 without the scale: subnormal numbers of few bits"
    # The gradient of a logit and the result are each rounded to fp16: 2 · 2^-11 of the largest terms.
    assert (x.grad - wide[0].grad).abs().max() < 2e-3 * wide[0].grad.abs().max()
    assert (weight.grad - wide[1].grad).abs().max() < 2e-3 * wide[1].grad.abs().max()
