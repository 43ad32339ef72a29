"""Readings of a run: what they say, and that taking them changes nothing."""

import copy
import json
import math
import pickle

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from parco.formats import Float, ScaleE4M3
from parco.kernels.cast import decode, encode
from parco.training import RECIPES, Recipe, Watch, prepare_, readings
from parco.training.recipe import FACTORS

TOKENS = torch.randint(0, 90, (4, 24), generator=torch.Generator().manual_seed(0))


def llama(recipe, checkpointing=False):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=90, num_hidden_layers=2, hidden_size=48, intermediate_size=80, num_attention_heads=4,
            num_key_value_heads=2,
        )
    )  # fmt: skip
    prepare_(model, RECIPES[recipe].with_(ends=0))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def train(model, watch, steps=4, micro=1):
    """The readings of each step and the parameters at the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for _ in range(steps):
        for part in TOKENS.chunk(micro):
            model(input_ids=part, labels=part).loss.backward()
        found.append(watch.step() if watch is not None else None)
        optimizer.step()
        optimizer.zero_grad()
    return found, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_a_watched_run_is_the_same_bit_for_bit(name, checkpointing):
    weights, seeds, found = [], [], []
    for watched in (False, True):
        model = llama(name, checkpointing)
        torch.manual_seed(5)
        read, parameters = train(model, Watch(model, every=2) if watched else None)
        weights.append(parameters + list(model.buffers()))
        seeds.append(torch.get_rng_state())
        found.append(read)
    assert all(map(torch.equal, *weights))
    assert torch.equal(*seeds)
    assert [None if each is None else each.step for each in found[1]] == [1, None, 3, None]
    first = found[1][0]
    assert len(first.operands) == 6 * (2 * 7 + 1)
    assert len(first.grad_norms) == 2 * 7 + 1
    recipe = RECIPES[name].with_(ends=0)
    for each in first.operands:
        own = RECIPES["bf16"] if each.layer == "lm_head" and not recipe.is_dense else recipe
        assert each.written in map(str, own.operands(each.operand))
        assert 0 <= each.underflow <= 1
        assert each.amax > 0
        assert each.snr_db > (50 if each.written == "bf16" else 4)


@pytest.mark.parametrize("name", [*RECIPES, "transformed"])
@pytest.mark.parametrize("rows", [8, 4096])
def test_readings_are_those_of_the_definition(name, rows, monkeypatch):
    """Against errors in fp64 of casts written out here. Of fewer rows the ratio is about the same."""
    monkeypatch.setattr(readings, "ROWS", rows)
    recipe = RECIPES.get(name) or Recipe.parse(
        "output=mxfp4+hadamard32 @ mxfp4+hadamard32; grad_input=fp8_e5m2:tensor @ fp8_e4m3:128x128; "
        "grad_weight=int8:row @ int4:32"
    )
    torch.manual_seed(1)
    layer = torch.nn.Linear(96, 64, bias=False)
    model = torch.nn.Sequential(layer)
    prepare_(model, recipe.with_(ends=0))
    x = torch.randn(160, 96) * torch.exp(torch.randn(160, 1))
    x[0, 3] = -40.0
    grad = torch.randn(160, 64) * 1e-3
    watch = Watch(model)
    model(x.requires_grad_()).backward(grad)
    found = {(each.product, each.operand): each for each in watch.step().operands}
    values = {"x": x.detach(), "weight": layer.weight.detach(), "grad": grad}
    for (product, role), reading in found.items():
        operand = (*recipe.pair(product),)[FACTORS[product].index(role)]
        assert reading.written == str(operand)
        assert reading.amax == pytest.approx(values[role].abs().max().item())
        if operand.is_delayed or operand.clamp or operand.hadamard or operand.rounding == "stochastic":
            assert 5 < reading.snr_db < 60
            continue
        rowwise = product == "output" or (product, role) == ("grad_input", "grad") or operand.reused
        source = values[role] if rowwise else values[role].T
        numbers = decode(encode(source.contiguous(), operand.format)).double()
        source = source.double()
        wanted = 10 * math.log10(source.square().sum() / (source - numbers).square().sum())
        lost = ((numbers == 0) & (source != 0)).double().mean().item()
        assert reading.snr_db == pytest.approx(wanted, abs=0.01 if rows > 160 else 6)
        assert reading.underflow == pytest.approx(lost, abs=1e-6 if rows > 160 else 0.1)
        if isinstance(operand.format.element, Float):
            # NVFP4's scales of blocks are rounded to e4m3: a block's greatest number may lie beyond 6 of them.
            assert reading.saturated <= (1 / 16 if isinstance(operand.format.scale, ScaleE4M3) else 0)


def test_what_lies_beyond_a_delayed_scale_is_saturated():
    model = torch.nn.Sequential(torch.nn.Linear(32, 16, bias=False))
    prepare_(model, "fp8-delayed")
    watch = Watch(model, every=1)
    x = torch.randn(64, 32).clamp(-2, 2)
    x[0, 0] = 2
    for factor in (1, 4):
        model(factor * x).sum().backward()
        found = {(each.product, each.operand): each for each in watch.step().operands}
        share = (factor * x.abs() > 2).double().mean().item()
        assert found["output", "x"].saturated == pytest.approx(share)
    assert share > 0.5
    assert found["output", "x"].amax == 8
    assert found["output", "x"].snr_db < 10


def test_micro_batches_count_together_and_evaluation_does_not():
    model = llama("mxfp8")
    watch = Watch(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=TOKENS)
    model.train()
    assert not any(layer._probe.sums.sums for layer in watch.layers.values())
    whole = train(model, watch, 1)[0][0]
    model = llama("mxfp8")
    parts = train(model, Watch(model), 1, micro=4)[0][0]
    for one, other in zip(whole.operands, parts.operands, strict=True):
        assert one.snr_db == pytest.approx(other.snr_db, abs=1.5)
    # Each micro-batch's loss is a mean of its own.
    assert parts.grad_norms["lm_head"] == pytest.approx(4 * whole.grad_norms["lm_head"], rel=0.05)


def test_steps_between_are_not_touched(monkeypatch):
    calls = []
    before = readings.compared
    monkeypatch.setattr(readings, "compared", lambda *a, **k: calls.append(1) or before(*a, **k))
    model = llama("nvfp4")
    watch = Watch(model, every=3)
    counts = []
    for _ in range(4):
        train(model, watch, 1)
        counts.append(len(calls))
        calls.clear()
    assert counts == [6 * 15, 0, 0, 6 * 15]
    watch.close()
    assert not watch.is_watching
    train(model, None, 1)
    assert not calls


def test_resuming_goes_on_where_it_stopped():
    model = llama("nvfp4")
    watch = Watch(model, every=3)
    torch.manual_seed(7)
    train(model, watch, 2)
    state = json.loads(json.dumps(watch.state_dict()))
    twin = copy.deepcopy(model)
    seeds = torch.get_rng_state()
    wanted = train(model, watch, 5)[0]
    torch.set_rng_state(seeds)
    resumed = Watch(twin, every=3)
    resumed.load_state_dict(state)
    assert train(twin, resumed, 5)[0] == wanted
    assert resumed.history == watch.history
    assert [each.step for each in watch.history] == [1, 4, 7]


def test_the_scalars_have_names():
    model = llama("mxfp8")
    found = train(model, Watch(model), 1)[0][0]
    scalars = found.scalars()
    assert len(scalars) == 4 * len(found.operands) + 15
    name = "model.layers.0.mlp.up_proj"
    assert scalars[f"watch/{name}/grad_weight/x/snr_db"] > 25
    grad = model.get_submodule(name).weight
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert scalars[f"watch/{name}/grad_norm"] > 0
    assert grad.grad is not None
    assert all(isinstance(value, float) for value in scalars.values())
    assert "dB" in str(found)
    assert len(str(found).splitlines()) == 11


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_watched_by_nobody(copied):
    model = llama("mxfp8")
    watch = Watch(model)
    twin = copied(model)
    train(twin, None, 1)
    assert not any(layer._probe.sums.sums for layer in watch.layers.values())
    Watch(twin)


def test_numbers_that_are_not_finite_are_read_too():
    model = torch.nn.Sequential(torch.nn.Linear(32, 16, bias=False))
    prepare_(model, "fp16")
    watch = Watch(model, every=1)
    x = torch.ones(8, 32, requires_grad=True)
    model(x).backward(torch.full((8, 16), 1e30))
    found = {(each.product, each.operand): each for each in watch.step().operands}
    assert found["grad_input", "grad"].snr_db == -math.inf
    assert found["grad_input", "grad"].saturated == 1
    model(x).backward(torch.full((8, 16), torch.nan))
    assert math.isnan({(e.product, e.operand): e for e in watch.step().operands}["grad_weight", "grad"].snr_db)


def test_wrong_use_is_said():
    with pytest.raises(ValueError, match="no prepared layer"):
        Watch(torch.nn.Linear(4, 4))
    model = llama("bf16")
    with pytest.raises(ValueError, match="every=0"):
        Watch(model, every=0)
    watch = Watch(model)
    with pytest.raises(ValueError, match="is watched already"):
        Watch(model)
    watch.close()
    other = Watch(model)
    assert watch.step() is None
    assert other.is_watching
