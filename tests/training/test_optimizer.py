"""AdamW as an optimizer: beside PyTorch's, resumed, under scalers and schedulers; 8-bit states and bf16 weights."""

import copy
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parco.training import AdamW

X, Y = (torch.randn(50, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))


def network(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 64)).to(dtype)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range, scheduler: Any = None) -> list[float]:
    losses = []
    dtype = next(model.parameters()).dtype
    for step in steps:
        loss = torch.nn.functional.mse_loss(model(X[step].to(dtype)).float(), Y[step])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def same(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """As a file gives it back."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("rate", [3e-3, torch.tensor(3e-3)], ids=["float", "tensor"])
def test_it_trains_as_pytorchs(rate: Any) -> None:
    ours, theirs = network(), network()
    # A scheduler writes into a rate that is a tensor.
    optimizers = (
        AdamW(ours.parameters(), copy.deepcopy(rate)),
        torch.optim.AdamW(theirs.parameters(), copy.deepcopy(rate)),
    )
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50) for optimizer in optimizers]
    losses = [
        train(model, optimizer, range(50), scheduler)
        for model, optimizer, scheduler in zip((ours, theirs), optimizers, schedulers, strict=True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        # Roundings of a step, some 2**-22 of it, add up over 50 steps of at most the rate.
        torch.testing.assert_close(a, b, rtol=0, atol=50 * 3e-3 * 2**-20)


def test_each_loads_the_others_state() -> None:
    for first, second in ((AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW), (torch.optim.Adam, AdamW)):
        options = {"weight_decay": 0.01} | ({"decoupled_weight_decay": True} if first is torch.optim.Adam else {})
        model = network()
        before = first(model.parameters(), lr=2e-3, betas=(0.8, 0.95), **options)
        train(model, before, range(10))
        twin = copy.deepcopy(model)
        after = second(twin.parameters())
        after.load_state_dict(saved(before))
        assert after.param_groups[0]["lr"] == 2e-3
        assert train(twin, after, range(10, 30)) == pytest.approx(train(model, before, range(10, 30)), rel=1e-5)
        again = first(twin.parameters())
        again.load_state_dict(saved(after))
        assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in again.state.values())


@pytest.mark.parametrize("states", ["fp32", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumed_is_never_interrupted_bit_for_bit(dtype: torch.dtype, states: Any) -> None:
    model = network(dtype)
    optimizer = AdamW(model.parameters(), lr=3e-3, states=states, seed=5)
    train(model, optimizer, range(7))
    twin = copy.deepcopy(model)
    resumed = AdamW(twin.parameters())
    resumed.load_state_dict(saved(optimizer))
    copied = copy.deepcopy(optimizer)
    assert str(copied.state_dict()) == str(optimizer.state_dict())
    train(model, optimizer, range(7, 20))
    train(twin, resumed, range(7, 20))
    assert same(model, twin)
    for mine, other in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())
        assert all(tensor.dtype in (torch.float32, torch.uint8) for tensor in mine.values())


def test_seed_and_place_decide_the_rounding() -> None:
    models = [network(torch.bfloat16) for _ in range(4)]
    for model, options in zip(models, ({}, {}, {"seed": 1}, {"rounding": "nearest"}), strict=True):
        train(model, AdamW(model.parameters(), **options), range(3))  # type: ignore[arg-type]
    assert same(models[0], models[1])
    assert not same(models[0], models[2])
    assert not same(models[0], models[3])
    twins = [torch.nn.Parameter(torch.ones(500, dtype=torch.bfloat16)) for _ in range(2)]
    for twin in twins:
        twin.grad = torch.ones_like(twin)
    AdamW(twins, lr=1e-3).step()
    assert not torch.equal(*twins)


@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_a_scaler_changes_nothing_and_skips_overflow(states: Any) -> None:
    plain, scaled = network(), network()
    optimizers = [AdamW(model.parameters(), lr=3e-3, states=states) for model in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    for step in range(12):
        for model, optimizer in zip((plain, scaled), optimizers, strict=True):
            loss = torch.nn.functional.mse_loss(model(X[step]), Y[step])
            if model is plain:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
        assert same(plain, scaled)  # the factors are powers of two
    assert scaler.get_scale() == 2.0**13
    before, state = copy.deepcopy(scaled), copy.deepcopy(optimizers[1].state_dict())
    scaler.scale(scaled(X[0]).sum() * math.inf).backward()
    scaler.step(optimizers[1])
    scaler.update()
    assert same(before, scaled)
    assert str(optimizers[1].state_dict()) == str(state)
    assert scaler.get_scale() == 2.0**12


def test_a_scaler_that_has_unscaled_for_clipping() -> None:
    plain, scaled = network(), network()
    optimizers = [AdamW(model.parameters(), lr=3e-3) for model in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for model, optimizer in zip((plain, scaled), optimizers, strict=True):
        loss = torch.nn.functional.mse_loss(model(X[0]), Y[0])
        (loss if model is plain else scaler.scale(loss)).backward()
        if model is scaled:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step() if model is plain else scaler.step(optimizer)
    assert same(plain, scaled)


def test_a_factor_of_ones_own_clips_within_the_pass() -> None:
    clipped, within = network(), network()
    for model in (clipped, within):
        torch.nn.functional.mse_loss(model(X[0]), Y[0]).backward()
    optimizer = AdamW(within.parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in within.parameters()])
    optimizer.grad_scale = (norm / 0.01).clamp(min=1)
    optimizer.step()
    torch.nn.utils.clip_grad_norm_(clipped.parameters(), 0.01)
    AdamW(clipped.parameters()).step()
    for a, b in zip(clipped.parameters(), within.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_that_are_not_finite_show() -> None:
    model = network()
    optimizer = AdamW(model.parameters(), states="8bit")
    train(model, optimizer, range(2))
    model(X[0]).sum().backward()
    weight: Any = model[0].weight  # type: ignore[index]
    weight.grad[3, 5] = math.nan
    optimizer.step()
    assert weight[3, 5].isnan()
    assert weight.isnan().sum() == 1
    model(X[0]).sum().backward()
    optimizer.step()
    assert weight.isnan().sum() > 1


def test_tied_frozen_unused_and_turned_parameters() -> None:
    tied, frozen, unused = (torch.nn.Linear(80, 60, bias=False) for _ in range(3))
    turned = torch.nn.Parameter(torch.randn(60, 80).T)
    frozen.requires_grad_(False)
    model = torch.nn.ModuleList([tied, frozen, unused])
    model.append(torch.nn.Linear(80, 60, bias=False))
    model[3].weight = tied.weight
    theirs, their_turned = copy.deepcopy(model), copy.deepcopy(turned)
    pairs = []
    for modules, last, kind in ((model, turned, AdamW), (theirs, their_turned, torch.optim.AdamW)):
        optimizer = kind([{"params": list(modules.parameters())}, {"params": [last], "lr": 1e-2}], lr=1e-3)
        for step in range(5):
            x = torch.cat((X[step], X[step][:, :16]), 1)
            (modules[0](x) @ last.T + modules[3](x).square().sum()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len(optimizer.state) == 2
        pairs.append([*modules.parameters(), last])
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-21, atol=1e-2 * 2**-18)
    assert turned.stride() == (1, 80)


def test_groups_may_differ() -> None:
    model = network()
    groups = [{"params": model[0].parameters(), "states": "8bit"}, {"params": model[2].parameters(), "lr": 0.0}]  # type: ignore[index]
    optimizer = AdamW(groups, weight_decay=0)
    before = copy.deepcopy(model)
    train(model, optimizer, range(2))
    assert "exp_avg_codes" in optimizer.state[model[0].weight]  # type: ignore[index]
    assert "exp_avg" in optimizer.state[model[2].weight]  # type: ignore[index]
    assert "exp_avg" in optimizer.state[model[0].bias]  # type: ignore[index]
    assert same(model[2], before[2])  # type: ignore[index]
    assert not same(model[0], before[0])  # type: ignore[index]


def test_a_closure_and_what_watches_a_step() -> None:
    model, seen = network(), []
    optimizer = AdamW(model.parameters())
    optimizer.register_step_post_hook(lambda *_: seen.append(1))

    def closure() -> Tensor:
        loss = model(X[0]).square().mean()
        loss.backward()
        return loss

    version = model[0].weight._version  # type: ignore[index]
    assert optimizer.step(closure).item() > 0
    assert seen == [1]
    assert model[0].weight._version > version  # type: ignore[index]


def test_8_bit_states_take_a_quarter() -> None:
    models = [torch.nn.Sequential(torch.nn.Linear(1000, 300), torch.nn.Linear(300, 1000)) for _ in range(2)]
    sizes = []
    for model, states in zip(models, ("fp32", "8bit"), strict=True):
        optimizer = AdamW(model.parameters(), states=states)  # type: ignore[arg-type]
        model(torch.randn(4, 1000)).sum().backward()
        optimizer.step()
        sizes.append(sum(t.nbytes for state in optimizer.state.values() for t in state.values()))
    assert sizes[1] < 0.26 * sizes[0]


def test_states_of_one_kind_load_as_the_other() -> None:
    """fp32 states of PyTorch go on in 8 bits where the optimizer keeps 8, and back by the group's own word."""
    model = network()
    theirs = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train(model, theirs, range(10))
    optimizer = AdamW(model.parameters(), states="8bit")
    optimizer.load_state_dict(saved(theirs))
    assert "exp_avg_codes" in optimizer.state[model[0].weight]  # type: ignore[index]
    state = saved(optimizer)
    state["param_groups"][0]["states"] = "fp32"
    back = AdamW(model.parameters())
    back.load_state_dict(state)
    wanted, found = (o.state[model[0].weight]["exp_avg_sq"] for o in (theirs, back))  # type: ignore[index]
    assert (found - wanted).norm() < 0.02 * wanted.norm()
    train(model, back, range(10, 12))
    state["state"][0].pop("exp_avg_scale")
    with pytest.raises(ValueError, match="exp_avg is needed"):
        back.load_state_dict(state)


def test_wrong_arguments_are_named() -> None:
    def parameter(**options: Any) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.zeros(3, **options))

    for options, message in (
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": torch.zeros(2)}, "lr is a tensor of 2"),
        ({"eps": -1.0}, "eps=-1.0"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\)"),
        ({"weight_decay": math.nan}, "weight_decay=nan"),
        ({"states": "int8"}, "states='int8'; one of fp32, 8bit"),
        ({"rounding": "zero"}, "rounding='zero'"),
        ({"seed": -3}, "seed=-3"),
    ):
        with pytest.raises(ValueError, match=message):
            AdamW([parameter()], **options)
    for dtype in (torch.float16, torch.complex64, torch.float64):
        with pytest.raises(TypeError, match=f"{dtype}; float32 or bfloat16"):
            AdamW([parameter(dtype=dtype)])
    table = torch.nn.Embedding(5, 4, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        AdamW(table.parameters()).step()
    with pytest.raises(ValueError, match=r"weight_decay=0.1 of Adam"):
        AdamW([parameter()]).load_state_dict(torch.optim.Adam([parameter()], weight_decay=0.1).state_dict())
    for option in ("amsgrad", "maximize"):
        theirs = torch.optim.AdamW([parameter()], **{option: True})
        with pytest.raises(ValueError, match=f"{option}=True is not supported"):
            AdamW([parameter()]).load_state_dict(theirs.state_dict())


def text(repository: Path) -> Tensor:
    """Bytes of the text that comes with parco."""
    characters = (repository / "src/parco/hub/embedded/calibration.txt").read_bytes()[:400_000]
    return torch.frombuffer(bytearray(characters), dtype=torch.uint8).long()


def learn(tokens: Tensor, dtype: torch.dtype, steps: int, **options: Any) -> tuple[float, float]:
    """A byte from the 8 before it, by two layers, of weights that are all of much the same size: the mean loss of the
    last 100 steps, and the share of weights that are as they were after 100 steps.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = {"embedding": (256, 32), "hidden": (256, 256), "output": (256, 256)}
    weights = [torch.nn.Parameter((torch.rand(s, generator=generator) / 8 - 1 / 16).to(dtype)) for s in shapes.values()]
    start = [weight.detach().clone() for weight in weights]
    optimizer, losses, unmoved = AdamW(weights, weight_decay=0, **options), [], 0.0
    for step in range(steps):
        places = torch.randint(0, len(tokens) - 9, (128, 1), generator=generator) + torch.arange(9)
        embedding, hidden, output = (weight.float() for weight in weights)
        inner = torch.nn.functional.gelu(16 * embedding[tokens[places[:, :8]]].flatten(1) @ hidden.T)
        loss = torch.nn.functional.cross_entropy(inner @ output.T, tokens[places[:, 8]])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 99:
            stayed = sum((a == b).sum().item() for a, b in zip(start, weights, strict=True))
            unmoved = stayed / sum(weight.numel() for weight in weights)
    return sum(losses[-100:]) / 100, unmoved


def test_bf16_weights_train_as_fp32_where_nearest_rounding_leaves_them(repository: Path) -> None:
    tokens = text(repository)
    wide, _ = learn(tokens, torch.float32, 700, lr=1e-5)
    nearest, unmoved = learn(tokens, torch.bfloat16, 700, lr=1e-5, rounding="nearest")
    stochastic, moved = learn(tokens, torch.bfloat16, 700, lr=1e-5)
    assert unmoved > 0.9 > moved
    assert abs(stochastic / wide - 1) < 0.01
    assert nearest / wide - 1 > 0.1


def test_8_bit_states_learn_as_fp32_ones(repository: Path) -> None:
    tokens = text(repository)
    wide, _ = learn(tokens, torch.float32, 500, lr=1e-3)
    coded, _ = learn(tokens, torch.float32, 500, lr=1e-3, states="8bit")
    assert wide < 3
    assert abs(coded / wide - 1) < 0.02
