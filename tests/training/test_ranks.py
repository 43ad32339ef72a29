"""A prepared model under PyTorch's own DDP and FSDP2, two ranks on gloo."""

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.ranks import RANKS, on_two_ranks
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from parco.training import AdamW, Watch, once_per_step, prepare_
from parco.training.once import STORE

STEPS = 6
X, Y = (torch.randn(STEPS, 128, 32, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))


def prepared(recipe: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))
    prepare_(model, recipe)
    return model


def train(model: torch.nn.Module, rank: int, ranks: int, watch: Watch | None = None) -> list[float]:
    """The mean loss of each step; a rank takes its share of the tokens, whole blocks of 32."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    share = slice(rank * 128 // ranks, (rank + 1) * 128 // ranks)
    losses = []
    for x, y in zip(X, Y, strict=True):
        loss = torch.nn.functional.mse_loss(model(x[share]), y[share])
        loss.backward()
        if watch is not None:
            watch.step()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / ranks)
    return losses


def accumulated(model: torch.nn.Module, rank: int, once: bool) -> tuple[list[float], int]:
    """The loss of each pass, four of them a step, and how many writings were held at most."""
    optimizer, losses, held = AdamW(model.parameters(), 0.01), [], 0
    with once_per_step() if once else contextlib.nullcontext():
        for x, y in zip(X, Y, strict=True):
            for part in range(4):
                own = slice(32 * part + 16 * rank, 32 * part + 16 * (rank + 1))
                loss = torch.nn.functional.mse_loss(model(x[own]), y[own])
                loss.backward()
                losses.append(loss.item())
            held = max(held, len(STORE.kept))
            optimizer.step()
            optimizer.zero_grad()
    return losses, held


def run(rank: int, kind: str, recipe: str) -> Any:
    model = prepared(recipe)
    if kind.startswith("once"):
        for layer in (model[0], model[2]):
            fully_shard(layer)
        return accumulated(fully_shard(model), rank, kind == "once")
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        for layer in (model[0], model[2]):
            fully_shard(layer)
        wrapped = fully_shard(model)
    watch = Watch(model, every=5, group=dist.group.WORLD)
    losses = train(wrapped, rank, RANKS, watch)
    return losses, get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), watch.state_dict()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    cases = [(kind, recipe) for kind in ("ddp", "fsdp2") for recipe in ("mxfp8", "fp8-delayed")]
    cases += [("once", "int8"), ("once, not", "int8")]
    return on_two_ranks(run, cases, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("recipe", ["mxfp8", "fp8-delayed"])
def test_two_ranks_train_as_one(kind: str, recipe: str, ranks: dict[Any, Any]) -> None:
    losses, state, read = ranks[kind, recipe]
    alone = prepared(recipe)
    watch = Watch(alone, every=5)
    wanted = train(alone, 0, 1, watch)
    # A tensor's scale is found on a rank's own tokens: the roundings of the gradients differ.
    assert losses == pytest.approx(wanted, rel=1e-3)
    assert losses[-1] < losses[0]
    assert [each["step"] for each in read["history"]] == [1, 6]
    for both, one in zip(read["history"], watch.history, strict=True):
        assert both["grad_norms"] == pytest.approx(one.grad_norms, rel=1e-2)
        for found, reading in zip(both["operands"], one.operands, strict=True):
            # A rank's loss is the mean of half of the tokens: its gradients are twice those of the whole batch.
            factor = RANKS if reading.operand == "grad" else 1
            assert found["amax"] == pytest.approx(factor * reading.amax, rel=5e-2)
            assert found["snr_db"] == pytest.approx(reading.snr_db, abs=1)
    assert set(state) == set(alone.state_dict())
    if recipe == "mxfp8":
        assert all(torch.allclose(state[name], tensor, atol=1e-5) for name, tensor in alone.state_dict().items())
    alone.load_state_dict(state)
    assert train(alone, 0, 1)[-1] < losses[-1]


def test_sharded_weights_are_written_once_a_step(ranks: dict[Any, Any]) -> None:
    (losses, held), (apart, none) = ranks["once", "int8"], ranks["once, not", "int8"]
    assert losses == apart
    assert (held, none) == (3, 0)  # no more than of one pass: the first layer's x needs no gradient
