"""A factor that q, k and v, or gate and up, hold together: one tensor everywhere, and multiplied once."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.nn import models
from tests.nn.test_decode import agree, steps
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import parco
from parco import nn
from parco.nn import joined, share_
from parco.nn.prepared import groups
from parco.weights import Dense, LowRank, Shared

WIDE = {**models.COMMON, "hidden_size": 64, "intermediate_size": 96}


def made(method: str = "joint(0.5)", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = models.t.AutoModelForCausalLM.from_config(models.t.Qwen2Config(**WIDE)).to(dtype).eval()
    parco.convert_(model, method)
    return model


def layers(model: Any) -> list[Any]:
    attention = model.model.layers[0].self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what Shared factors have multiplied, by themselves."""
    found: list[tuple[int, ...]] = []
    apply = Shared.apply

    def counted(self: Shared, x: torch.Tensor, *tensors: torch.Tensor, **named: Any) -> torch.Tensor:
        found.append(tuple(x.shape))
        return apply(self, x, *tensors, **named)

    monkeypatch.setattr(Shared, "apply", counted)
    return found


def test_it_is_one_tensor_wherever_the_model_goes() -> None:
    model = made()
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).to("cpu")):
        q, k, v = layers(other)
        assert q.weight.right is k.weight.right is v.weight.right
        parameters = [name for name, _ in other.named_parameters() if "layers.0.self_attn" in name and "basis" in name]
        assert parameters == ["model.layers.0.self_attn.q_proj.weight.right.basis.values"]
    moved = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    assert layers(moved)[0].weight.right is layers(moved)[2].weight.right
    moved.load_state_dict(model.state_dict())
    assert all(
        torch.equal(a.weight.dense(), b.weight.dense()) for a, b in zip(layers(moved), layers(model), strict=True)
    )


@pytest.mark.parametrize("method", ["joint(0.5)", "joint(0.5)>>int8:row", "joint(rank=16)>>int4:16"])
def test_it_is_multiplied_once_and_the_bits_are_the_same(method: str, narrow: list[tuple[int, ...]]) -> None:
    model = made(method)
    x = torch.randn(1, 3, 64)
    for product in ("native", "activations(int8)") if ">>int8" in method else ("native",):
        nn.set_product_(model, product)
        apart = [layer.weight.spec.apply(x, *layer.weight.tensors(), bias=layer.bias, product=layer.weight.product)
                 for layer in layers(model)]  # fmt: skip
        narrow.clear()
        with torch.no_grad():
            for _ in range(2):
                assert all(map(torch.equal, (layer(x) for layer in layers(model)), apart))
        assert narrow == [(1, 3, 64)] * 2, "once for each pass of all three"


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.inference_mode])
def test_where_something_could_tell_each_multiplies_by_itself(
    grad: Callable[[], Any], narrow: list[tuple[int, ...]]
) -> None:
    model = made()
    with grad():
        x = torch.randn(1, 3, 64)
        for layer in layers(model):
            layer(x)
    assert narrow == []
    assert layers(model)[0].weight.right.narrow._kept is None


def test_changed_inputs_and_weights_are_multiplied_anew() -> None:
    model = made()
    q, k, v = layers(model)
    with torch.no_grad():
        x = torch.randn(1, 3, 64)
        before = q(x), k(x)
        x.mul_(2)
        torch.testing.assert_close(k(x) - k.bias, 2 * (before[1] - k.bias))
        torch.testing.assert_close(v(x), torch.nn.functional.linear(x, v.weight.dense(), v.bias))
        q.weight.right.basis.values.zero_()
        assert torch.equal(q(x), q.bias.expand(1, 3, -1)), "a second pass sees new numbers"


def test_nothing_outlives_the_last_layer_that_asks() -> None:
    for model in (made(), copy.deepcopy(made()), pickle.loads(pickle.dumps(made()))):
        q, k, v = layers(model)
        shared = q.weight.right.narrow
        with torch.no_grad():
            x = torch.randn(1, 3, 64)
            for layer in (k, q):
                layer(x)
            assert shared._kept is not None
            v(x)
        assert shared._kept is None, "x lives on"
        share_([layer.weight for layer in (q, k, v)])
        assert shared.takers == 3, "who holds it already is counted once"


def test_nothing_outlives_the_input() -> None:
    model = made()
    with torch.no_grad():
        models.logits(model)
        gc.collect()
        assert layers(model)[0].weight.right.narrow._kept is None


@pytest.mark.parametrize("method", ["joint(0.5)", "joint(0.5)>>int8:row"])
def test_fused_layers_multiply_by_it_in_one_product_of_all(method: str) -> None:
    model = made(method)
    expected, several = steps(model), models.logits(model)
    parco.fuse_(model)
    for layer in model.model.layers:
        for module, kind in ((layer, "layer"), (layer.mlp, "gate")):
            for members in groups(module, kind):
                whole = joined.joined(members)
                assert whole is not None
                assert isinstance(whole[0], LowRank)
                assert whole[0].shape[0] == sum(member.out_features for member in members)
    agree(steps(model), expected)
    torch.testing.assert_close(models.logits(model), several, atol=1e-5, rtol=1e-5)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert joined.joined(layers(model)) is None
    agree(steps(model), expected)


def test_gradients_are_those_of_the_whole_matrix() -> None:
    model = made()
    x = torch.randn(2, 3, 64, requires_grad=True)
    sum(layer(x).square().sum() for layer in layers(model)).backward()
    other = x.detach().clone().requires_grad_()
    sum(
        torch.nn.functional.linear(other, layer.weight.dense(), layer.bias).square().sum() for layer in layers(model)
    ).backward()
    torch.testing.assert_close(x.grad, other.grad, atol=1e-5, rtol=1e-4)


def test_the_compiler_traces_it() -> None:
    model = made()
    with torch.no_grad():
        compiled = torch.compile(model.model.layers[0].mlp, fullgraph=True, backend="aot_eager")
        x = torch.randn(1, 4, 64)
        torch.testing.assert_close(compiled(x), model.model.layers[0].mlp(x))


def test_sharding_sees_one_parameter(tmp_path: Path) -> None:
    model = made()
    expected = models.logits(model)
    store = torch.distributed.FileStore(str(tmp_path / "meeting"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        held = [name for name, each in model.named_parameters() if "basis" in name and isinstance(each, DTensor)]
        assert len(held) == 2 * len(model.model.layers)
        assert torch.equal(models.logits(model), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_only_parts_that_are_alike_are_shared() -> None:
    def stored(rank: int, shared: bool = True) -> nn.StoredWeight:
        right = Dense((rank, 8), "fp32")
        return nn.StoredWeight.empty(LowRank(Dense((6, rank), "fp32"), Shared(right) if shared else right))

    share_([stored(2), stored(2)])
    with pytest.raises(ValueError, match="no shared parts that are alike"):
        share_([stored(2), stored(3)])
    with pytest.raises(ValueError, match="no shared parts that are alike"):
        share_([stored(2, shared=False), stored(2, shared=False)])
