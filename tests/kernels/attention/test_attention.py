"""attention and its derivative: every kernel against fp64 within its dtype's rounding, whatever the sizes."""

from typing import Any

import pytest
import torch
from tests.kernels.rowwise.test_rowwise import FLOATS, inputs, usable
from tests.laws.kernel_laws import KernelLaws
from torch import Tensor

from parco.kernels.attention import attention

SIZES = [  # heads, key heads, queries, keys, columns
    (1, 1, 1, 1, 1),
    (3, 1, 5, 5, 12),
    (4, 2, 64, 64, 64),
    (2, 2, 65, 130, 40),
    (6, 2, 130, 131, 80),
    (2, 1, 200, 200, 7),
    (80, 40, 70, 70, 4),
]


def tensors(sizes: tuple[int, ...], dtype: torch.dtype, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, keys, values and the gradient of y, of different strides, none of them contiguous."""
    heads, key_heads, queries, tokens, columns = sizes
    q = inputs(batch, queries, heads, columns, dtype=dtype, seed=1).transpose(1, 2)
    room = inputs(batch, key_heads, tokens + 3, columns, dtype=dtype, seed=2)
    values = inputs(batch, tokens, key_heads, columns, dtype=dtype, seed=3).transpose(1, 2)
    grad = inputs(batch, heads, queries + 2, columns, dtype=dtype, seed=4)
    return q, room[:, :, :tokens], values, grad[:, :, 2:]


def exact(q: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> Tensor:
    """In fp64, written out."""
    group = q.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    scores = torch.einsum("bhqc,bhtc->bhqt", q.double(), keys) * scale
    if causal:
        last = torch.arange(q.shape[2])[:, None] + keys.shape[2] - q.shape[2]
        scores = torch.where(torch.arange(keys.shape[2]) > last, float("-inf"), scores)
    return torch.einsum("bhqt,bhtc->bhqc", scores.softmax(-1), values)


def assert_near(found: Tensor, wanted: Tensor, error: float, name: str) -> None:
    """Within a rounding of found's dtype and `error` of the greatest number."""
    bound = torch.finfo(found.dtype).eps / 2 * 1.01 * wanted.abs() + error * (1 + wanted.abs().max())
    assert ((found.double() - wanted).abs() <= bound).all(), f"{name}: {(found.double() - wanted).abs().max()}"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_of_every_kernel(sizes: tuple[int, ...], dtype: torch.dtype, causal: bool) -> None:
    q, keys, values, grad = tensors(sizes, dtype)
    leaves = [x.double().requires_grad_() for x in (q, keys, values)]
    wanted = exact(*leaves, 0.3, causal)
    wanted_grads = torch.autograd.grad(wanted, leaves, grad.double())
    wanted = wanted.detach()
    for name, run in usable("attention"):
        y, logs = run(q, keys, values, 0.3, causal)
        assert y.transpose(1, 2).is_contiguous() and y.dtype == dtype, name
        assert_near(y, wanted, 2e-6, name)
        # Backward reads a rounded y: grad · y, of so many columns, is that much off.
        rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps * sizes[-1] ** 0.5 / 2
        for kernel, backward in usable("attention_backward"):
            if kernel.split("-")[-1] != name.split("-")[-1]:
                continue
            found = backward(grad, q, keys, values, y, logs, 0.3, causal)
            for mine, theirs in zip(found, wanted_grads, strict=True):
                assert mine.transpose(1, 2).is_contiguous() and mine.dtype == dtype, kernel
                assert_near(mine, theirs, 1e-5 + rounding, kernel)


def test_a_query_sees_no_later_key() -> None:
    q, keys, values, _ = tensors((2, 1, 150, 153, 16), torch.float32)
    for name, run in usable("attention"):
        y, _ = run(q, keys, values, 0.3, True)
        later = keys.clone(), values.clone()
        later[0][:, :, 100:], later[1][:, :, 100:] = float("nan"), 1e6
        unchanged = run(q, *later, 0.3, True)[0]
        assert torch.equal(unchanged[:, :, :97], y[:, :, :97]), name  # query 97 sees 101 of the keys
        assert unchanged[:, :, 97:].isnan().all(), name


def test_large_scores_and_infinities() -> None:
    q, keys, values, _ = tensors((1, 1, 70, 70, 8), torch.float32)
    best = (keys @ q.transpose(2, 3)).argmax(2)[..., None].expand(-1, -1, -1, 8)
    for name, run in usable("attention"):
        y, logs = run(q * 1e4, keys, values, 1.0, False)
        torch.testing.assert_close(y, values.gather(2, best), msg=name)
        assert logs.isfinite().all(), name
        hidden = keys.clone()
        hidden[:, :, 3] = float("-inf")
        hidden[:, :, 3, 1:] = 0.0
        positive = torch.cat((q[..., :1].abs() + 1, q[..., 1:]), -1)
        without = [torch.cat((x[:, :, :3], x[:, :, 4:]), 2) for x in (keys, values)]
        torch.testing.assert_close(
            run(positive, hidden, values, 0.3, False)[0], run(positive, *without, 0.3, False)[0], msg=name
        )
        assert run(q * float("nan"), keys, values, 1.0, False)[0].isnan().all(), name
        absent = keys.clone()
        absent[:, :, :64] = float("nan")
        assert run(q, absent, values, 1.0, False)[0].isnan().all(), name
        hidden[:, :, :66] = hidden[:, :, 3:4]  # all of the first 64 keys
        without = [x[:, :, 66:] for x in (keys, values)]
        torch.testing.assert_close(
            run(positive, hidden, values, 0.3, False)[0], run(positive, *without, 0.3, False)[0], msg=name
        )


@pytest.mark.parametrize("shape", [(1, 2, 300), (3, 8, 70)], ids=str)
def test_results_do_not_depend_on_the_threads(shape: tuple[int, int, int]) -> None:
    batch, heads, count = shape
    q, keys, values, grad = tensors((heads, 2, count, count, 32), torch.float32, batch)
    leaves = [x.detach().requires_grad_() for x in (q, keys, values)]
    threads, results = torch.get_num_threads(), []
    try:
        for used in (1, 2, 5):
            torch.set_num_threads(used)
            y = attention(*leaves, causal=True)
            results.append((y.detach(), *torch.autograd.grad(y, leaves, grad)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_what_does_not_fit_is_named() -> None:
    q, keys, values, _ = tensors((4, 2, 6, 6, 8), torch.float32)
    for error, message, arguments in (
        (TypeError, "q is torch.int64", (q.long(), keys, values)),
        (ValueError, r"q has the shape \(4, 6, 8\)", (q[0], keys, values)),
        (ValueError, "q has the shape .*at least 1 column", (q[..., :0], keys[..., :0], values[..., :0])),
        (ValueError, "keys has the shape", (q, keys[..., :7], values)),
        (ValueError, "keys has 2 heads; a divisor of 3", (q[:, :3], keys, values)),
        (ValueError, "values has the shape", (q, keys, values[:, :, :5])),
        (TypeError, "values is torch.bfloat16; torch.float32", (q, keys, values.bfloat16())),
    ):
        with pytest.raises(error, match=message):
            attention(*arguments)
    with pytest.raises(ValueError, match="causal with 5 keys for 6 queries"):
        attention(q, keys[:, :, :5], values[:, :, :5], causal=True)
    with pytest.raises(ValueError, match="logs is"):
        torch.ops.parco.attention_backward.default(q, q, keys, values, q, q[..., 0].half(), 1.0, False)


def test_no_queries() -> None:
    q, keys, values, _ = tensors((4, 2, 6, 6, 8), torch.float32)
    leaves = [x.detach().requires_grad_() for x in (q[:, :, :0], keys, values)]
    y = attention(*leaves)
    assert y.shape == (2, 4, 0, 8)
    grads = torch.autograd.grad(y, leaves, torch.empty_like(y))
    assert all(not each.any() for each in grads)


class TestAttention(KernelLaws):
    operation = "attention"

    @pytest.fixture(params=[(torch.float32, True), (torch.bfloat16, False)], ids=str)
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        dtype, causal = request.param
        q, keys, values, _ = tensors((4, 2, 9, 9, 12), dtype)
        return *(x.detach().requires_grad_() for x in (q, keys, values)), 0.25, causal


class TestAttentionBackward(KernelLaws):
    operation = "attention_backward"

    @pytest.fixture(params=[(torch.float32, True), (torch.float16, False)], ids=str)
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        dtype, causal = request.param
        q, keys, values, grad = tensors((4, 2, 9, 9, 12), dtype)
        y, logs = torch.ops.parco.attention.default(q, keys, values, 0.25, causal)
        return grad, q, keys, values, y, logs, 0.25, causal
