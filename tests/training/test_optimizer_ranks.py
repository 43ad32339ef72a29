"""AdamW under FSDP2, two ranks on gloo: as one rank, bit for bit in the weights it is handed, and its checkpoints."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from parco.training import AdamW

STEPS, RANKS = 5, 2


def network() -> torch.nn.Module:
    """Rows that two ranks share unevenly, and a vector of which the second rank's part starts at an odd place."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(300, 37), torch.nn.Linear(37, 300)).bfloat16()


def give_gradients(model: torch.nn.Module, step: int, rank: int, ranks: int) -> None:
    """Made up, not summed: so that whole and shared parameters get the same bits."""
    for i, p in enumerate(model.parameters()):
        grad: Any = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)).to(p.dtype)
        if ranks > 1:
            part = torch.chunk(grad, ranks)[rank]
            sharded: Any = p
            grad = type(sharded.data).from_local(
                part.contiguous(), sharded.device_mesh, sharded.placements, shape=p.shape, stride=p.stride()
            )
        p.grad = grad


def train(model: torch.nn.Module, optimizer: AdamW, steps: range, rank: int = 0, ranks: int = 1) -> None:
    for step in steps:
        give_gradients(model, step, rank, ranks)
        optimizer.step()
        optimizer.zero_grad()


def run(rank: int, states: Any, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = dist.FileStore(f"{folder}/meeting", RANKS)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=RANKS, timeout=timedelta(minutes=2))
    model = network()
    fully_shard(model)
    optimizer = AdamW(model.parameters(), lr=1e-2, states=states)
    train(model, optimizer, range(STEPS), rank, RANKS)
    options = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=options), get_optimizer_state_dict(model, optimizer, options=options)
    again = AdamW(model.parameters(), lr=1e-2, states=states)
    set_optimizer_state_dict(
        model,
        again,
        state[1] if rank == 0 else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    train(model, again, range(STEPS, 2 * STEPS), rank, RANKS)
    later = get_model_state_dict(model, options=options)
    if rank == 0:
        torch.save((*state, later), f"{folder}/result.pt")
    dist.barrier()  # nobody leaves while another still waits for an answer
    dist.destroy_process_group()


@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_two_ranks_are_one(states: Any, tmp_path: Path) -> None:
    mp.spawn(run, (states, str(tmp_path)), nprocs=RANKS)
    weights, state, later = torch.load(tmp_path / "result.pt", weights_only=True)
    alone = network()
    optimizer = AdamW(alone.parameters(), lr=1e-2, states=states)
    train(alone, optimizer, range(STEPS))
    assert all(torch.equal(weights[name], tensor) for name, tensor in alone.state_dict().items())
    for name, p in alone.named_parameters():
        assert all(torch.equal(state["state"][name][key], tensor) for key, tensor in optimizer.state[p].items())
    twin = network()
    twin.load_state_dict(weights)
    resumed = AdamW(twin.parameters(), states=states)
    set_optimizer_state_dict(twin, resumed, state, options=StateDictOptions(full_state_dict=True))
    train(twin, resumed, range(STEPS, 2 * STEPS))
    train(alone, optimizer, range(STEPS, 2 * STEPS))
    for name, tensor in alone.state_dict().items():
        assert torch.equal(twin.state_dict()[name], tensor)
        assert torch.equal(later[name], tensor)
