"""q, k and v of several rows as one product: the same bits, and nothing kept, where nobody asks for more than that."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from tests.nn import models
from tests.nn.test_fuse import apart

import parco
from parco import nn
from parco.nn import fuse_
from parco.nn.together import StandIn, Together, keeps_its_input

WIDE = {**models.COMMON, "hidden_size": 64, "intermediate_size": 96}


def made(stored: str | None = "int4:32", **options: Any) -> Any:
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(t.Qwen2Config(**{**WIDE, **options})).eval()
    if stored:
        parco.convert_(model, stored)
    fuse_(model)
    return model


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each product of all three had."""
    found: list[int] = []
    multiply = Together.multiply

    def counted(self: Any, x: torch.Tensor, layers: Any) -> Any:
        found.append(x.numel() // x.shape[-1])
        return multiply(self, x, layers)

    monkeypatch.setattr(Together, "multiply", counted)
    return found


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("product", ["native", "activations(int8)"])
@pytest.mark.parametrize("stored", ["int4:32", "int8:row", "fp8_e4m3:row", "bf16"])
def test_together_and_apart_are_the_same_bits(
    stored: str, product: str, grad: Callable[[], Any], products: list[int]
) -> None:
    if product != "native" and not stored.startswith("int"):
        pytest.skip("only integers take it")
    model = made(stored)
    nn.set_product_(model, product)
    tokens = models.tokens(4)
    with grad():
        found = model(tokens, use_cache=True)
        assert products == [36, 36]
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        alone = model(tokens, use_cache=True)
    assert products == [36, 36]
    assert torch.equal(found.logits, alone.logits)
    for ours, theirs in zip(found.past_key_values.layers, alone.past_key_values.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


def test_what_asks_for_more_takes_the_modules(products: list[int]) -> None:
    model = made()
    tokens = models.tokens(4)
    with torch.inference_mode():
        expected = model(tokens).logits
        products.clear()
        model(tokens[:3])  # 27 rows
        seen = []
        handle = model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: seen.append(1))
        assert torch.equal(model(tokens).logits, expected)
        assert (seen, products) == ([1], [36])
        handle.remove()
        query = model.model.layers[0].self_attn.q_proj
        query.forward = lambda x, run=query.forward: 2 * run(x)
        assert apart(model(tokens).logits, expected) > 1e-3
        del query.forward
        products.clear()
        with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
            assert torch.equal(model(tokens).logits, expected)
    assert torch.equal(model(tokens).logits.detach(), expected)  # gradients may be asked for
    assert not products
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert apart(compiled(tokens).logits, expected) < 1e-6
    assert not products


def test_changed_weights_are_seen(products: list[int]) -> None:
    model = made()
    tokens = models.tokens(4)
    other = copy.deepcopy(model)
    with torch.inference_mode():
        before = model(tokens).logits
        attention = model.model.layers[0].self_attn
        products.clear()
        nn.replace_(attention, "k_proj", nn.StoredWeight.encode(parco.weights.Dense((32, 64)), torch.ones(32, 64) / 9))
        changed = model(tokens).logits
        assert products == [36]
        assert apart(changed, before) > 1e-4
        nn.set_product_(other, "activations(int8)", lambda name: "v_proj" in name)
        products.clear()
        other(tokens)
        assert not products
        nn.set_product_(other, "native")
        assert torch.equal(other(tokens).logits, before)
        assert products == [36, 36]


def test_nothing_is_kept() -> None:
    model = made()
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            model(models.tokens(4))
        assert not any(type(each) is StandIn for each in gc.get_objects())
    finally:
        gc.enable()


def test_an_input_that_changes_between_is_multiplied_anew(products: list[int]) -> None:
    model = made()
    attention = model.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    with torch.no_grad():
        x = torch.randn(3, 64)
        stand_in = StandIn(attention, layers, Together(layers))
        assert torch.equal(stand_in.q_proj(x), layers[0](x))
        x += 1
        assert torch.equal(stand_in.k_proj(x), layers[1](x))
        assert torch.equal(stand_in.v_proj(x * 2), layers[2](x * 2))
        assert torch.equal(stand_in.q_proj(x), layers[0](x))
    assert products == [3]
    assert stand_in.head_dim == attention.head_dim


def in_place(self: Any, x: torch.Tensor) -> torch.Tensor:
    q = self.q_proj(x)
    x += q
    return x


def by_index(self: Any, x: torch.Tensor) -> torch.Tensor:
    x[0] = 1
    return x


def on_itself(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.last = x
    return x


def plain(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.q_proj(x) + x


def test_code_that_writes_is_not_run_so() -> None:
    assert [keeps_its_input(each) for each in (in_place, by_index, on_itself, plain)] == [False, False, False, True]
