"""What says that a weight has changed."""

import pytest
import torch

from parco.training import AdamW
from parco.training.steps import optimizer_steps, weight_state


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, fused=True),
        lambda p: torch.optim.AdamW(p, foreach=True),
        lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
        AdamW,
    ],
    ids=["fused", "foreach", "sgd", "parco"],
)
def test_a_step_of_any_optimizer_shows(make) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = make([weight])
    seen, steps = weight_state(weight), optimizer_steps()
    (weight * 2).sum().backward()
    assert weight_state(weight) == seen
    optimizer.step()
    assert optimizer_steps() == steps + 1
    assert weight_state(weight) != seen


def test_other_writes_show() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    states = [weight_state(weight)]
    with torch.no_grad():
        weight.zero_()
    states.append(weight_state(weight))
    weight.data = torch.ones(3)
    states.append(weight_state(weight))
    assert len(set(states)) == 3
