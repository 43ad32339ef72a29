"""Adapters under PyTorch's own DDP and FSDP2, two ranks on gloo."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.ranks import RANKS, on_two_ranks
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import parco
from parco import adapters

STEPS = 4
X, Y = (torch.randn(STEPS, 16, 32, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))


def adapted(base: str, text: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))
    if base != "dense":
        parco.convert_(model, parco.Quantize(base))
    adapters.add_(model, text)
    return model


def train(model: torch.nn.Module, rank: int, ranks: int) -> list[float]:
    """The mean loss of each step; a rank takes its share of the rows."""
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1.0)
    share = slice(rank * 16 // ranks, (rank + 1) * 16 // ranks)
    losses = []
    for x, y in zip(X, Y, strict=True):
        loss = torch.nn.functional.mse_loss(model(x[share]), y[share])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / ranks)
    return losses


def run(rank: int, kind: str, base: str, text: str) -> Any:
    model = adapted(base, text)
    if kind == "ddp":
        wrapped: torch.nn.Module = DistributedDataParallel(model)
    else:
        for layer in (model[0], model[2]):
            fully_shard(layer)
        wrapped = fully_shard(model)
    losses = train(wrapped, rank, RANKS)
    return losses, get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


CASES = [
    ("ddp", "dense", "lora(4)"),
    ("fsdp2", "dense", "dora(4)"),
    ("fsdp2", "int4:32", "lora(4)"),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    return on_two_ranks(run, CASES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one(case: tuple[str, str, str], ranks: dict[Any, Any]) -> None:
    losses, state = ranks[case]
    alone = adapted(*case[1:])
    assert losses == pytest.approx(train(alone, 0, 1), rel=1e-5)
    assert set(state) == set(alone.state_dict())
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5)
    assert any(name.endswith(("lora_B", "up.weight")) and tensor.abs().max() > 0 for name, tensor in state.items())
