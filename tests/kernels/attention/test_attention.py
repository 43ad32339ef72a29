"""attention and its derivative: every kernel against fp64 within its dtype's rounding, whatever the sizes."""

from typing import Any

import pytest
import torch
from tests.kernels.rowwise.test_rowwise import FLOATS, inputs, usable
from tests.laws.kernel_laws import KernelLaws
from torch import Tensor

from parco.kernels.attention import attention
from parco.kernels.cast import random_bits

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


def masks(sizes: tuple[int, ...], kind: str, batch: int = 2) -> Tensor | None:
    """Which keys queries see: of their own example alone, in some 40 tokens each; of a sequence that is padded at one
    end; any, other ones of every head, and some queries none.
    """
    heads, _, queries, tokens, _ = sizes
    if kind == "none":
        return None
    if kind == "packed":
        ends = torch.arange(tokens) // 40
        return (ends[tokens - queries :, None] == ends).expand(batch, 1, queries, tokens)
    if kind == "padded":
        return (torch.arange(tokens) >= torch.tensor([0, tokens // 2])[:, None])[:, None, None]
    generator = torch.Generator().manual_seed(heads * tokens)
    mask = torch.rand(batch, heads, tokens, queries, generator=generator).transpose(2, 3) < 0.3
    return mask & (torch.arange(queries) % 7 != 3)[:, None]


def exact(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | None = None,
    factors: Tensor | float = 1.0,
) -> Tensor:
    """In fp64, written out; the softmaxes times `factors`."""
    group = q.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    scores = torch.einsum("bhqc,bhtc->bhqt", q.double(), keys) * scale
    if causal:
        last = torch.arange(q.shape[2])[:, None] + keys.shape[2] - q.shape[2]
        scores = torch.where(torch.arange(keys.shape[2]) > last, float("-inf"), scores)
    if mask is None:
        return torch.einsum("bhqt,bhtc->bhqc", scores.softmax(-1) * factors, values)
    scores = torch.where(mask, scores, float("-inf"))
    sees = (scores > float("-inf")).any(-1, keepdim=True)
    shares = torch.where(sees, scores, 0.0).softmax(-1) * sees * factors
    return torch.einsum("bhqt,bhtc->bhqc", shares, values)


def assert_near(found: Tensor, wanted: Tensor, error: float, name: str) -> None:
    """Within a rounding of found's dtype and `error` of the greatest number."""
    bound = torch.finfo(found.dtype).eps / 2 * 1.01 * wanted.abs() + error * (1 + wanted.abs().max())
    assert ((found.double() - wanted).abs() <= bound).all(), f"{name}: {(found.double() - wanted).abs().max()}"


@pytest.mark.parametrize("kind", ["none", "packed", "padded", "any"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_of_every_kernel(sizes: tuple[int, ...], dtype: torch.dtype, causal: bool, kind: str) -> None:
    q, keys, values, grad = tensors(sizes, dtype)
    mask = masks(sizes, kind)
    leaves = [x.double().requires_grad_() for x in (q, keys, values)]
    wanted = exact(*leaves, 0.3, causal, mask)
    wanted_grads = torch.autograd.grad(wanted, leaves, grad.double())
    wanted = wanted.detach()
    for name, run in usable("attention"):
        y, logs = run(q, keys, values, 0.3, causal, mask)
        assert y.transpose(1, 2).is_contiguous() and y.dtype == dtype, name
        assert_near(y, wanted, 2e-6, name)
        # Backward reads a rounded y: grad · y, of so many columns, is that much off.
        rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps * sizes[-1] ** 0.5 / 2
        for kernel, backward in usable("attention_backward"):
            if kernel.split("-")[-1] != name.split("-")[-1]:
                continue
            found = backward(grad, q, keys, values, y, logs, 0.3, causal, mask)
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


def test_what_a_mask_hides_is_nothing_to_a_query() -> None:
    sizes = (2, 1, 150, 150, 16)
    q, keys, values, grad = tensors(sizes, torch.float32)
    mask = masks(sizes, "packed")
    assert mask is not None
    for name, run in usable("attention"):
        y, logs = run(q, keys, values, 0.3, True, mask)
        other = keys.clone(), values.clone()
        other[0][:, :, :40], other[1][:, :, :40] = float("nan"), 1e6
        changed = run(q, *other, 0.3, True, mask)[0]
        assert torch.equal(changed[:, :, 40:], y[:, :, 40:]), name
        assert changed[:, :, :40].isnan().all(), name
        alone = [x[:, :, 40:80].contiguous() for x in (q, keys, values)]
        torch.testing.assert_close(run(*alone, 0.3, True)[0], y[:, :, 40:80], msg=name)
        blind = mask & (torch.arange(150) != 70)[:, None]
        y, logs = run(q, keys, values, 0.3, True, blind)
        assert not y[:, :, 70].any() and (logs[:, :, 70] == float("inf")).all(), name
        for kernel, backward in usable("attention_backward"):
            grads = backward(grad, q, keys, values, y, logs, 0.3, True, blind)
            assert not grads[0][:, :, 70].any() and all(each.isfinite().all() for each in grads), kernel


@pytest.mark.parametrize("kind", ["none", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(3, 1, 5, 5, 12), (4, 2, 130, 131, 20)], ids=str)
def test_dropout_of_every_kernel(sizes: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    q, keys, values, grad = tensors(sizes, dtype)
    mask, seed, p = masks(sizes, kind), torch.tensor([2**62 - 3]), 0.3
    drawn = random_bits(2**62 - 3, range(q.shape[:3].numel()), sizes[3]).reshape(*q.shape[:3], sizes[3])
    factors = (drawn >= int(p * 2**32)) / (1 - p)
    leaves = [x.double().requires_grad_() for x in (q, keys, values)]
    wanted = exact(*leaves, 0.3, True, mask, factors)
    wanted_grads = torch.autograd.grad(wanted, leaves, grad.double())
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps * sizes[-1] ** 0.5
    for name, run in usable("attention"):
        y, logs = run(q, keys, values, 0.3, True, mask, seed, p)
        assert_near(y, wanted.detach(), 4e-6, name)
        for kernel, backward in usable("attention_backward"):
            if kernel.split("-")[-1] == name.split("-")[-1]:
                found = backward(grad, q, keys, values, y, logs, 0.3, True, mask, seed, p)
                for mine, theirs in zip(found, wanted_grads, strict=True):
                    assert_near(mine, theirs, 2e-5 + rounding, kernel)


def test_the_share_that_is_dropped() -> None:
    """4σ of so many draws; what is kept makes up for the rest."""
    tokens, p = 512, 0.1
    q, keys, values = torch.zeros(1, 2, tokens, 8), torch.zeros(1, 2, tokens, 8), torch.ones(1, 2, tokens, 8)
    y = attention(q, keys, values, seed=torch.tensor([7]), p=p)
    draws = 2 * tokens * tokens
    assert abs(float(y[..., 0].mean()) - 1) < 4 * (p / (1 - p) / draws) ** 0.5
    assert not torch.equal(y, attention(q, keys, values, seed=torch.tensor([8]), p=p))


def test_a_mask_is_differentiated_through() -> None:
    sizes = (4, 2, 70, 70, 8)
    q, keys, values, grad = (x.detach().requires_grad_() for x in tensors(sizes, torch.float32))
    mask = masks(sizes, "packed")
    wanted = torch.autograd.grad(exact(q, keys, values, 8**-0.5, True, mask).float(), (q, keys, values), grad)
    found = torch.autograd.grad(attention(q, keys, values, causal=True, mask=mask), (q, keys, values), grad)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


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
            y = attention(*leaves, causal=True, seed=torch.tensor([5]), p=0.2)
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
    with pytest.raises(ValueError, match="p is 1; it must be at least 0 and below 1"):
        attention(q, keys, values, seed=torch.tensor([1]), p=1.0)
    for seed in (None, torch.tensor([1.0]), torch.tensor([1, 2])):
        with pytest.raises(ValueError, match="seed must be one int64"):
            attention(q, keys, values, seed=seed, p=0.1)
    with pytest.raises(TypeError, match=r"mask is torch\.float32; torch\.bool"):
        attention(q, keys, values, mask=torch.zeros(2, 1, 6, 6))
    for shape in ((6, 6), (2, 3, 6, 6), (2, 1, 6, 5)):
        with pytest.raises(ValueError, match=r"mask has the shape .*becomes \(2, 4, 6, 6\)"):
            attention(q, keys, values, mask=torch.ones(shape, dtype=torch.bool))
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

    @pytest.fixture(
        params=[(torch.float32, True, None), (torch.bfloat16, False, "none"), (torch.float32, False, "any")], ids=str
    )
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        dtype, causal, kind = request.param
        sizes = (4, 2, 9, 9, 12)
        q, keys, values, _ = tensors(sizes, dtype)
        given = (*(x.detach().requires_grad_() for x in (q, keys, values)), 0.25, causal)
        return given if kind is None else (*given, masks(sizes, kind), torch.tensor([3]), 0.25)


class TestAttentionBackward(KernelLaws):
    operation = "attention_backward"

    @pytest.fixture(params=[(torch.float32, True, "none"), (torch.float16, False, "any")], ids=str)
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        dtype, causal, kind = request.param
        sizes = (4, 2, 9, 9, 12)
        q, keys, values, grad = tensors(sizes, dtype)
        given = (0.25, causal, masks(sizes, kind), torch.tensor([3]), 0.25)
        y, logs = torch.ops.parco.attention.default(q, keys, values, *given)
        return grad, q, keys, values, y, logs, *given
