"""A model with the fused loss under PyTorch's own DDP and FSDP2, two ranks on gloo."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.nn.models import model
from tests.ranks import on_two_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from parco.training import fuse_loss_

IDS = torch.randint(3, 101, (8, 12), generator=torch.Generator().manual_seed(4))


def train(made: nn.Module, ids: Tensor) -> None:
    optimizer = torch.optim.SGD(made.parameters(), lr=0.05)
    for _ in range(4):
        made(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def sharded(made: Any) -> nn.Module:
    for layer in made.model.layers:
        fully_shard(layer)
    return fully_shard(made)


def run(rank: int, kind: str) -> dict[str, Tensor]:
    made: Any = fuse_loss_(model("llama tied").train())
    train(DistributedDataParallel(made) if kind == "ddp" else sharded(made), IDS[rank * 4 : rank * 4 + 4])
    state = get_model_state_dict(made, options=StateDictOptions(full_state_dict=True))
    if kind == "fsdp2":
        alone: Any = fuse_loss_(model("llama").train())
        fully_shard(alone.lm_head)
        with pytest.raises(ValueError, match="lm_head is sharded by itself"):
            train(sharded(alone), IDS)
    return state


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    alone = model("llama tied").train()
    train(alone, IDS)
    for state in on_two_ranks(run, [("ddp",), ("fsdp2",)], tmp_path).values():
        assert set(state) == set(alone.state_dict())
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close(state[name], tensor, atol=2e-5, rtol=1e-4, msg=name)
