"""A prepared model under PyTorch's own DDP and FSDP2, two ranks on gloo."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from parco.training import Watch, prepare_

STEPS, RANKS = 6, 2
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


def run(rank: int, kind: str, recipe: str, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = dist.FileStore(f"{folder}/meeting", RANKS)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=RANKS, timeout=timedelta(minutes=2))
    model = prepared(recipe)
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        for layer in (model[0], model[2]):
            fully_shard(layer)
        wrapped = fully_shard(model)
    watch = Watch(model, every=5, group=dist.group.WORLD)
    losses = train(wrapped, rank, RANKS, watch)
    options = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=options)
    if rank == 0:
        torch.save((losses, state, watch.state_dict()), f"{folder}/result.pt")
    dist.barrier()  # nobody leaves while another still waits for an answer
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("recipe", ["mxfp8", "fp8-delayed"])
def test_two_ranks_train_as_one(kind, recipe, tmp_path: Path):
    mp.spawn(run, (kind, recipe, str(tmp_path)), nprocs=RANKS)
    losses, state, read = torch.load(tmp_path / "result.pt", weights_only=True)
    alone = prepared(recipe)
    watch = Watch(alone, every=5)
    wanted = train(alone, 0, 1, watch)
    # A tensor's scale is found on a rank's own tokens: the roundings of the gradients differ.
    assert losses == pytest.approx(wanted, rel=1e-3)
    assert losses[-1] < losses[0]
    assert [each["step"] for each in read["history"]] == [1, 6]
    for ranks, one in zip(read["history"], watch.history, strict=True):
        assert ranks["grad_norms"] == pytest.approx(one.grad_norms, rel=1e-2)
        for found, reading in zip(ranks["operands"], one.operands, strict=True):
            # A rank's loss is the mean of half of the tokens: its gradients are twice those of the whole batch.
            factor = RANKS if reading.operand == "grad" else 1
            assert found["amax"] == pytest.approx(factor * reading.amax, rel=5e-2)
            assert found["snr_db"] == pytest.approx(reading.snr_db, abs=1)
    assert set(state) == set(alone.state_dict())
    if recipe == "mxfp8":
        assert all(torch.allclose(state[name], tensor, atol=1e-5) for name, tensor in alone.state_dict().items())
    alone.load_state_dict(state)
    assert train(alone, 0, 1)[-1] < losses[-1]
