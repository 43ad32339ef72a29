"""Weights that are written once for all passes of a step: the same numbers, fewer casts, nothing stale."""

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from parco.training import RECIPES, AdamW, Recipe, once_per_step, prepare_, products
from parco.training.once import STORE
from parco.training.recipe import known

SHAPES = {(40, 24), (24, 40)}
"""Of the two weights below."""
RECIPE = "output=mxfp8_e4m3 @ fp8_e4m3:tensor; grad_input=bf16 @ fp8_e4m3:tensor+reused; grad_weight=bf16 @ bf16"
"""One whose forward keeps what it wrote of the weight."""


def made(recipe: str, dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.Linear(40, 24)).to(dtype)
    prepare_(model, recipe, filter_fn=lambda *_: True)
    return model


def one_pass(run: Any, x: Tensor) -> float:
    loss = run(x.requires_grad_()).float().square().mean()
    loss.backward()
    return loss.item()


def trained(recipe: str, once: bool, compiled: bool = False, dtype: torch.dtype = torch.float32) -> list[Any]:
    """The losses of two steps of three passes, and the parameters."""
    model = made(recipe, dtype)
    optimizer = AdamW(model.parameters(), 0.1)
    run = torch.compile(model, fullgraph=True) if compiled else model
    losses: list[Any] = []
    with once_per_step() if once else contextlib.nullcontext():
        for _ in range(2):
            losses += [one_pass(run, torch.randn(7, 24, dtype=dtype)) for _ in range(3)]
            optimizer.step()
            optimizer.zero_grad()
    return losses + [parameter.tolist() for parameter in model.parameters()]


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, ...]]:
    """How many matrices of each shape were written."""
    counts: Counter[tuple[int, ...]] = Counter()
    write = products.write

    def counting(operand: Any, x: Tensor, **how: Any) -> Any:
        counts[tuple(x.shape)] += 1
        return write(operand, x, **how)

    monkeypatch.setattr(products, "write", counting)
    return counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", [*RECIPES, RECIPE])
def test_training_is_the_same_to_the_bit(recipe: str, dtype: torch.dtype) -> None:
    assert trained(recipe, True, dtype=dtype) == trained(recipe, False, dtype=dtype)
    assert not STORE.opened and not STORE.kept


@pytest.mark.parametrize("recipe", ["int8", "fp4-dge", RECIPE])
def test_a_compiled_model_finds_them_too(recipe: str, casts: Counter[tuple[int, ...]]) -> None:
    apart = trained(recipe, False, compiled=True)
    many = sum(casts[shape] for shape in SHAPES)
    casts.clear()
    assert trained(recipe, True, compiled=True) == apart
    assert sum(casts[shape] for shape in SHAPES) * 3 == many


@pytest.mark.parametrize(
    ("recipe", "writings"),
    [
        ("int8", 2),  # forward's, and its transpose along the outputs
        ("fp8-current", 1),  # one scale, so backward turns forward's
        ("nvfp4", 1),  # blocks of 16 x 16
        ("bitnet", 1),
        (str(Recipe.parse("int8").with_(output="int8:row @ int8:row+stochastic")), 1 + 3),
    ],
)
def test_a_weight_is_written_once_a_step(recipe: str, writings: int, casts: Counter[tuple[int, ...]]) -> None:
    model = made(recipe)
    optimizer = AdamW(model.parameters(), 0.1)
    with once_per_step():
        for step in (1, 2):
            for _ in range(3):
                one_pass(model, torch.randn(7, 24))
            assert [casts[shape] for shape in sorted(SHAPES)] == [writings * step] * 2
            optimizer.step()


CHANGES = ("AdamW", "torch's AdamW, fused", "in place", "another tensor", "load_state_dict", "data", "numpy", "alias")


@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_that_changed_is_written_again(change: str) -> None:
    def changed(model: torch.nn.Module, other: Tensor) -> None:
        first: Any = model.get_parameter("0.weight")
        if change == "AdamW":
            AdamW(model.parameters(), 0.1).step()
        elif change == "torch's AdamW, fused":
            torch.optim.AdamW(model.parameters(), 0.1, fused=True).step()
        elif change == "in place":
            with torch.no_grad():
                first.mul_(-1)
        elif change == "another tensor":
            first.data = first.data * -1
        elif change == "data":
            first.data.mul_(-1)
        elif change == "numpy":
            first.detach().numpy()[3, 5] = 9
        elif change == "alias":
            other.mul_(-1)
        else:
            model.load_state_dict({name: -each for name, each in model.state_dict().items()})

    def losses(once: bool) -> list[float]:
        model = made("int8")
        first = model.get_parameter("0.weight")
        other = first.detach().clone()
        first.data = other
        found = []
        with once_per_step() if once else contextlib.nullcontext():
            for _ in range(2):
                found.append(one_pass(model, torch.ones(7, 24)))
                changed(model, other)
        return found

    apart = losses(False)
    assert losses(True) == apart and apart[0] != apart[1]


class Times(torch.nn.Module):
    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.number


@pytest.mark.parametrize("trains", [False, True], ids=["forward", "checkpointed"])
def test_weights_that_a_compiled_graph_makes_in_one_buffer(trains: bool) -> None:
    """Inductor puts one matrix where another was, under the same version."""

    def losses(once: bool) -> list[float]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = torch.nn.Sequential(*(torch.nn.Linear(32, 32, bias=False) for _ in range(3)))
        prepare_(model, "int8", filter_fn=lambda *_: True)
        for i, layer in enumerate(model):
            parametrize.register_parametrization(layer, "weight", Times(1.0 + i))

        def run(x: Tensor) -> Tensor:
            return checkpoint(model, x, use_reentrant=False) if trains else model(x)  # type: ignore[no-any-return]

        compiled = torch.compile(run)
        found = []
        with once_per_step() if once else contextlib.nullcontext(), torch.set_grad_enabled(trains):
            for _ in range(2):
                y = compiled(torch.ones(8, 32)).square().mean()
                if trains:
                    y.backward()
                found.append(y.item())
        return found + [p.grad.norm().item() for p in model.parameters() if p.grad is not None]

    assert losses(True) == losses(False)


def test_what_is_held_goes_with_the_step_and_the_last_of_those_who_asked() -> None:
    model = made("int8")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with once_per_step():
        with once_per_step():
            one_pass(model, torch.ones(7, 24))
        assert len(STORE.kept) == 4
        optimizer.step()
        assert not STORE.kept
        model(torch.ones(7, 24))
        with pytest.raises(RuntimeError, match="an accident"), once_per_step():
            raise RuntimeError("an accident")
        assert len(STORE.kept) == 2
    assert not STORE.kept
    one_pass(model, torch.ones(7, 24))
    assert not STORE.kept


def test_a_matrix_of_which_a_weight_is_made_in_each_pass_is_never_taken_for_another() -> None:
    recipe = known("int8")
    with once_per_step():
        for number in range(3):
            weight = torch.full((4, 32), float(number))
            found = products.Step(recipe, [], {}).write("output", 1, weight).numbers()
            assert torch.equal(found, weight)


def test_what_was_made_of_weights_that_are_gone_is_not_held() -> None:
    recipe = known("int8")
    stays = torch.ones(4, 32)
    with once_per_step():
        for number in range(40):
            products.Step(recipe, [], {}).write("output", 1, stays)
            products.Step(recipe, [], {}).write("output", 1, torch.full((4, 32), float(number)))
            assert len(STORE.kept) <= 2


def test_what_takes_no_longer_than_reading_is_not_held() -> None:
    with once_per_step():
        made("mxfp8")(torch.ones(2, 24))
        for dtype in (torch.float32, torch.bfloat16):
            made("bf16", dtype)(torch.ones(2, 24, dtype=dtype))
        assert not STORE.kept


def test_weights_of_inference_mode(casts: Counter[tuple[int, ...]]) -> None:
    with torch.inference_mode():
        model = made("int8")
        with once_per_step():
            for _ in range(2):
                model(torch.ones(7, 24))
    assert casts[40, 24] == 1
