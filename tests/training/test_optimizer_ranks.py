"""AdamW under FSDP2, two ranks on gloo: as one rank, bit for bit in the weights it is handed, and its checkpoints."""

from typing import Any

import pytest
import torch
from tests.ranks import RANKS, on_two_ranks
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from parco.training import AdamW

STEPS = 5


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


def run(rank: int, states: Any) -> Any:
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
    return *state, later


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    return on_two_ranks(run, [("fp32",), ("8bit",)], tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_two_ranks_are_one(states: Any, ranks: dict[Any, Any]) -> None:
    weights, state, later = ranks[(states,)]
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
