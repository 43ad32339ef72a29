"""Zeros: every published formula against its few lines, and what each keeps of a layer's outputs."""

import pytest
import torch
from torch import Tensor

from parco.fitting.methods import Prune, QuantizedPrune, output_error, parse
from parco.fitting.methods import Quantize as Few
from parco.fitting.pattern import Pattern
from parco.fitting.search import IntegerGrid
from parco.fitting.sparsegpt import sparsegpt
from parco.fitting.statistics import DAMPING, Statistics
from parco.formats import parse as parse_format
from parco.weights import Bitmap, BlockSparse, SemiSparse

COLUMNS = 160
PATTERNS = ["2:4", "50%", "75%", "block:16", "block:32:75%"]


def inputs(columns: int = COLUMNS, tokens: int = 800) -> Tensor:
    """Correlated, and of very different sizes, as those of a language model."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(tokens, columns // 8, generator=generator) @ torch.randn(
        columns // 8, columns, generator=generator
    )
    own = torch.randn(tokens, columns, generator=generator)
    return (common + own) * torch.logspace(0.4, -0.4, columns)[torch.randperm(columns, generator=generator)]


def weights(rows: int = 48, columns: int = COLUMNS) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.05


def published_sparsegpt(weight: Tensor, x: Tensor, pattern: str, scale: Tensor | None = None) -> Tensor:
    """The paper's algorithm as it is written down, with an inverse, in float64; equal counts in every row."""
    w = weight.double().clone()
    hessian = 2 * x.double().T @ x.double()
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    rows, columns = w.shape
    out = torch.zeros_like(w)
    for start in range(0, columns, 128):
        stop = min(start + 128, columns)
        block, errors = w[:, start:stop].clone(), torch.zeros(rows, stop - start).double()
        local, mask = inverse[start:stop, start:stop], torch.zeros(rows, stop - start, dtype=torch.bool)
        cost = block.square() / local.diagonal().square()
        if pattern == "50%":
            mask.scatter_(1, cost.argsort(1)[:, : (stop - start) // 2], True)
        for i in range(stop - start):
            if pattern == "2:4" and i % 4 == 0:
                now = block[:, i : i + 4].square() / local.diagonal()[i : i + 4].square()
                mask.scatter_(1, i + now.argsort(1)[:, :2], True)
            stored = block[:, i] if scale is None else (block[:, i] / scale).round().clamp(-127, 127) * scale
            out[:, start + i] = stored * ~mask[:, i]
            errors[:, i] = (block[:, i] - out[:, start + i]) / local[i, i]
            block[:, i:] -= errors[:, i : i + 1] * local[i, i:]
        w[:, stop:] -= errors @ inverse[start:stop, stop:]
    return out


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_sparsegpt_is_the_papers(pattern: str) -> None:
    x, weight = inputs(), weights()
    found = sparsegpt(weight, Statistics.of(x), Pattern.parse(pattern)).values
    expected = published_sparsegpt(weight, x, pattern)
    # Two numbers of nearly equal cost may change places between float32 and float64, and what follows with them.
    assert ((found != 0) == (expected != 0)).all(1).float().mean() > 0.9
    same = ((found != 0) == (expected != 0)).all(1)
    torch.testing.assert_close(found[same].double(), expected[same], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_zeros_and_rounding_in_one_pass_are_the_papers(pattern: str) -> None:
    x, weight = inputs(), weights()
    grid = IntegerGrid.of(parse_format("int8:row"))
    found = sparsegpt(weight, Statistics.of(x), Pattern.parse(pattern), grid)
    assert found.scale is not None
    expected = published_sparsegpt(weight, x, pattern, found.scale[:, 0].double())
    same = ((found.values != 0) == (expected != 0)).all(1)
    assert same.float().mean() > 0.7
    steps = (found.values.double() - expected)[same] / found.scale[same].double()
    assert (steps.abs() < 1e-3).double().mean() > 0.99
    spec, tensors = parse(f"prune({pattern})>>int8:row")(weight, Statistics.of(x))
    torch.testing.assert_close(spec.dense(*tensors), found.values, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("pattern", "kept"), [("2:4", 2), ("50%", COLUMNS // 2)])
def test_wanda_keeps_what_is_largest_of_its_row(pattern: str, kept: int) -> None:
    x, weight = inputs(), weights()
    spec, tensors = Prune(pattern, "wanda", "fp32")(weight, Statistics.of(x))
    score = (weight.abs() * x.norm(dim=0)).unflatten(1, (-1, 4 if pattern == "2:4" else COLUMNS))
    threshold = score.topk(kept).values[..., -1:]
    torch.testing.assert_close(spec.dense(*tensors), weight * (score >= threshold).flatten(1), rtol=0, atol=0)


def test_blocks_are_judged_by_the_sum_of_their_squares() -> None:
    x, weight = inputs(), weights()
    spec, tensors = Prune("block:16", "wanda", "fp32")(weight, Statistics.of(x))
    sums = (weight * x.norm(dim=0)).square().unflatten(0, (-1, 16)).unflatten(2, (-1, 16)).sum((1, 3))
    kept = torch.zeros_like(sums).scatter_(1, sums.topk(sums.shape[1] // 2).indices, 1.0)
    expected = weight * kept.repeat_interleave(16, 0).repeat_interleave(16, 1)
    torch.testing.assert_close(spec.dense(*tensors), expected, rtol=0, atol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_score_keeps_more_of_the_outputs_than_the_one_before(pattern: str) -> None:
    weight, seen = weights(), Statistics.of(inputs())
    errors = [
        float(output_error(weight, *Prune(pattern, score, "fp32")(weight, seen), seen).sum())
        for score in ("magnitude", "wanda", "sparsegpt")
    ]
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] < 0.8 * errors[1]


def test_auto_is_sparsegpt_where_inputs_were_seen_and_an_unseen_expert_is_pruned_by_magnitude() -> None:
    weight, seen = weights(), Statistics.of(inputs())
    empty = Statistics(torch.zeros(COLUMNS, COLUMNS), 0)
    for score, statistics, like in (
        ("auto", seen, Prune("2:4", "sparsegpt")(weight, seen)),
        ("auto", None, Prune("2:4", "magnitude")(weight)),
        ("wanda", empty, Prune("2:4", "magnitude")(weight)),
        ("sparsegpt", empty, Prune("2:4", "magnitude")(weight)),
    ):
        assert all(map(torch.equal, Prune("2:4", score)(weight, statistics)[1], like[1]))  # pyright: ignore


def test_inputs_that_were_never_seen_lose_their_weights() -> None:
    x = inputs()
    x[:, ::3] = 0.0
    spec, tensors = Prune("50%")(weights(), Statistics.of(x))
    assert spec.dense(*tensors)[:, ::3].abs().max() == 0


def test_shifted_inputs_aim_at_the_original_outputs() -> None:
    original, weight = inputs(), weights()
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(5)) * original.std(0)
    shifted = original @ (torch.eye(COLUMNS) * 0.8) + 0.2 * noise
    without, aiming = Statistics.of(shifted), Statistics.of(shifted, original)

    def error(statistics: Statistics) -> float:
        values = sparsegpt(weight, statistics, Pattern.parse("50%")).values
        return float((shifted @ values.T - original @ weight.T).square().sum())

    assert error(aiming) < 0.8 * error(without)


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("shape", [(48, 160), (40, 90), (3, 5)])
def test_patterns_keep_as_much_in_every_row_and_no_less_than_was_said(text: str, shape: tuple[int, int]) -> None:
    pattern = Pattern.parse(text)
    assert Pattern.parse(str(pattern)) == pattern
    assert str(pattern) == text
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    mask = pattern.keep(scores)
    assert torch.equal(pattern.spec("fp32", shape).keep(scores), mask)
    counts = mask.sum(1)
    if pattern.block == 1:
        assert (counts == counts[0]).all()
        assert counts[0] >= (1 - pattern.removed) * shape[1] - 1e-6
    else:
        across = -(-shape[1] // pattern.block)
        blocks = torch.nn.functional.pad(mask, (0, -shape[1] % pattern.block)).unflatten(1, (-1, pattern.block)).any(2)
        assert (blocks.sum(1) >= (1 - pattern.removed) * across - 1e-6).all()
    # In parts, as sparsegpt chooses: together as many as at once.
    parts = [pattern.keep(scores[:, at : at + 64], at) for at in range(0, shape[1], 64)]
    if pattern.block == 1:
        assert torch.equal(torch.cat(parts, 1).sum(1), counts)


def test_patterns_are_stored_by_the_weights_made_for_them() -> None:
    assert Prune("2:4").spec((8, 64)) == SemiSparse("bf16", (8, 64))
    assert Prune("75%").spec((8, 64)) == Bitmap("bf16", (8, 64), 16)
    assert Prune("block:32").spec((64, 256)) == BlockSparse("bf16", (64, 256), 32, 4)
    assert (Prune("2:4") >> Few("int8:row")) == QuantizedPrune(Prune("2:4"), Few("int8:row"))
    assert (Prune("2:4") >> Few("int8:row")).spec((8, 64)) == SemiSparse("int8:row", (8, 64))


@pytest.mark.parametrize(
    "text", ["", "3:4", "%", "50", "0%", "100%", "block:8", "block:", "block:32:", "50%:2", "1.2.3%"]
)
def test_unknown_patterns_name_the_known_ones(text: str) -> None:
    with pytest.raises(ValueError, match=r"known are 2:4, a share of zeros such as 50%"):
        Pattern.parse(text)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="score must be one of auto, magnitude, wanda, sparsegpt"):
        Prune("2:4", "random")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="for few bits"):
        Prune("2:4", format="int8:row")
    for score in ("wanda", "sparsegpt"):
        with pytest.raises(ValueError, match="score=magnitude does without"):
            Prune("2:4", score)(weights())
    with pytest.raises(ValueError, match="160 columns, the statistics have 32"):
        sparsegpt(weights(), Statistics.of(inputs(32)), Pattern.parse("2:4"))


@pytest.mark.parametrize("text", ["prune(2:4)>>int4:32@gptq", "prune(2:4,score=wanda)>>int8:row@gptq"])
def test_gptq_that_cannot_be_had_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="gptq rounds kept numbers in sparsegpt's pass"):
        parse(text)
    assert str(parse(text.replace("gptq", "rtn"))) == text.replace("gptq", "rtn")


@pytest.mark.parametrize("text", ["prune(2:4)>>int8:row@actorder", "prune(2:4)>>mxfp4@actorder"])
def test_activation_order_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="without @actorder"):
        parse(text)


def test_a_share_is_printed_whole() -> None:
    assert Pattern.parse(str(Pattern.parse("33.3333333%"))) == Pattern.parse("33.3333333%")
