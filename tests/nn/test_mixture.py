"""Fused experts: one call gives what the module gives, and whatever else is asked of them is the module's."""

import copy
import sys
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.laws.kernel_laws import each_isa
from tests.laws.weight_laws import stored_tensors
from tests.nn import models
from tests.nn.conftest import Calls
from tests.nn.test_decode import TOKENS, agree, last, low_rank, steps
from tests.nn.test_fuse import apart

import parco
from parco import _C, nn
from parco.nn import chains, fuse_, mixture, parts
from parco.weights import Dense, Quantized, SemiSparse

STORED = [None, "bf16", "int4:16", "int8:row", "fp8_e4m3:row", "nf4:16"]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """How many tokens each compiled call of experts had."""
    found, run = Calls(), _C.run_experts

    def counted(*arguments: Any) -> None:
        found.append(arguments[6])
        run(*arguments)

    monkeypatch.setattr(_C, "run_experts", counted)
    return found


def mixtral(stored: str | None = None, dtype: torch.dtype = torch.float32, **changed: Any) -> Any:
    torch.manual_seed(3)
    config = models.t.MixtralConfig(**{**models.COMMON, "num_local_experts": 5, **changed})
    made = models.t.AutoModelForCausalLM.from_config(config).eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    made = made.to(dtype)
    if stored:
        parco.convert_(made, stored)
    return made


def routes(tokens: int, choices: int = 2, count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(tokens)
    scores = torch.rand(tokens, count, generator=made)
    weights, index = scores.topk(choices)
    return index, weights


def pair(stored: str | None = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The experts of one model, plain and fused."""
    made = mixtral(stored, dtype)
    plain = copy.deepcopy(made)
    assert len(fuse_(made).fused["experts"]) == 2
    return plain.model.layers[0].mlp.experts, made.model.layers[0].mlp.experts


@pytest.mark.parametrize("tokens", [1, 3, 150])
@pytest.mark.parametrize("stored", STORED)
def test_experts_are_the_same_in_one_call(stored: str | None, tokens: int, runs: Calls) -> None:
    plain, fused = pair(stored)
    x, (index, weights) = torch.randn(tokens, 48), routes(tokens)
    runs.clear()
    with torch.inference_mode():
        assert apart(fused(x, index, weights), plain(x, index, weights)) < 2e-6
    assert runs == ([tokens] if tokens < 150 or stored else [])  # many rows of fp32 are PyTorch's


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [None, "int4:16"])
def test_in_few_bits_they_are_no_further_from_the_truth(stored: str | None, dtype: torch.dtype, runs: Calls) -> None:
    plain, fused = pair(stored, dtype)
    x, (index, weights) = torch.randn(3, 48, dtype=dtype), routes(3)
    weights = weights.to(dtype)
    with torch.inference_mode():
        truth = copy.deepcopy(plain).float()(x.float(), index, weights.float())
        runs.clear()
        assert apart(fused(x, index, weights), truth) < 1.1 * apart(plain(x, index, weights), truth)
    assert runs == [3]


def test_one_token_and_many_are_the_same_bits() -> None:
    """Products in integers are; the weighted sum is by token and in its choices' order."""
    _, fused = pair("int4:16")
    x, (index, weights) = torch.randn(40, 48), routes(40)
    with torch.inference_mode():
        together = fused(x, index, weights)
        for m in range(40):
            assert torch.equal(fused(x[m : m + 1], index[m : m + 1], weights[m : m + 1])[0], together[m])


def test_experts_held_elsewhere_add_nothing(runs: Calls) -> None:
    plain, fused = pair("int4:16")
    x, weights = torch.randn(3, 48), torch.ones(3, 2)
    index = torch.tensor([[1, 5], [2, 7], [5, 5]])
    with torch.inference_mode():
        runs.clear()
        found = fused(x, index, weights)
        assert apart(found[:2], plain(x, torch.tensor([[1, 5], [2, 5], [5, 5]]), weights)[:2]) < 2e-6
        assert not found[2].any()
        assert runs == [3]
        assert not fused(x[2:], index[2:], weights[2:]).any()
        assert fused(x[:0], index[:0], weights[:0]).shape == (0, 48)


def test_gradients_autocast_and_other_arguments_take_the_module(runs: Calls) -> None:
    plain, fused = pair()
    x, (index, weights) = torch.randn(3, 48), routes(3)
    runs.clear()
    grads = []
    for each in (plain, fused):
        own = x.clone().requires_grad_()
        each(own, index, weights).sum().backward()
        grads.append(own.grad)
    assert torch.equal(*grads)
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fused(x, index, weights), plain(x, index, weights))
        named = {"hidden_states": x, "top_k_index": index, "top_k_weights": weights}
        assert torch.equal(fused(**named), plain(**named))
        assert torch.equal(fused(x, index.int(), weights), plain(x, index.int(), weights))
    assert not runs


def test_hooks_and_changes_are_seen(runs: Calls) -> None:
    _, fused = pair("int4:16")
    x, (index, weights) = torch.randn(4, 48), routes(4)
    chosen = int(index[0, 0])
    with torch.inference_mode():
        before, seen = fused(x, index, weights), []
        runs.clear()
        hook = fused.down_proj[chosen].register_forward_hook(lambda *_: seen.append(1))
        assert apart(fused(x, index, weights), before) < 2e-6
        assert seen
        assert not runs
        hook.remove()
        zeros = nn.StoredWeight.encode(Dense((48, 88), "fp32"), torch.zeros(48, 88))
        kept, fused.down_proj[chosen] = fused.down_proj[chosen], zeros
        changed = fused(x, index, weights)
        assert apart(changed, before) > 1e-2
        fused.down_proj[chosen] = kept
        for parameter in fused.parameters():
            parameter.data = parameter.data.clone()
        assert torch.equal(fused(x, index, weights), before)
        kept.unpack_()
        assert torch.equal(fused(x, index, weights), before)
        kept.product = parco.products.parse("activations(int8)")
        rounded = fused(x, index, weights)
        assert 1e-5 < apart(rounded, before) < 1e-1
        kept.product = parco.products.parse("native")
        assert torch.equal(fused(x, index, weights), before)
        fused.act_fn = torch.nn.ReLU()
        assert apart(fused(x, index, weights), before) > 1e-2


def test_a_parameter_of_other_numbers_is_seen(runs: Calls) -> None:
    plain, fused = pair()
    x, (index, weights) = torch.randn(1, 48), routes(1)
    with torch.inference_mode():
        fused(x, index, weights)
        for each in (plain, fused):
            each.down_proj.data = each.down_proj.data * 2
        runs.clear()
        assert apart(fused(x, index, weights), plain(x, index, weights)) < 2e-6
        assert runs == [1]


def test_weights_of_other_kinds_are_multiplied_too_or_left() -> None:
    made = mixtral()
    experts = "model.layers.{}.mlp.experts.{}_proj[{}]"
    for index in range(5):
        for name, shape in (("gate_up", (176, 48)), ("down", (48, 88))):
            spec = low_rank(shape, None) if index % 2 else Quantized("int8:row", shape)
            other = SemiSparse("fp32", shape) if (index, name) == (2, "down") else Quantized("int4:16", shape)
            for layer, each in enumerate((spec, other)):
                held = nn.StoredWeight(each, stored_tensors(each))
                nn.replace_(made, experts.format(layer, name, index), held)
    expected = steps(made)
    fusion = fuse_(made)
    assert fusion.fused["experts"] == ("model.layers.0.mlp.experts",)
    assert "no compiled kernel" in fusion.left["model.layers.1.mlp.experts"]
    agree(steps(made), expected)


def test_experts_that_compute_something_else_are_left() -> None:
    made = mixtral()
    first, second = (layer.mlp.experts for layer in made.model.layers)

    class Doubled(type(first)):
        def forward(self, *inputs: Any) -> torch.Tensor:
            return 2 * super().forward(*inputs)

    first.__class__ = Doubled
    second.act_fn = torch.nn.Sigmoid()
    expected = steps(made)
    fusion = fuse_(made)
    assert "experts" not in fusion.fused
    assert "replaced" in fusion.left["model.layers.0.mlp.experts"]
    assert "activation" in fusion.left["model.layers.1.mlp.experts"]
    agree(steps(made), expected)


@pytest.mark.parametrize("normalized", [True, False])
def test_either_weighing_decodes_in_one_call_a_token(normalized: bool, calls: Calls) -> None:
    config = models.t.Qwen3MoeConfig(**models.COMMON, **models.MIXTURE, **models.HEADS, norm_topk_prob=normalized)
    torch.manual_seed(0)
    made = models.t.AutoModelForCausalLM.from_config(config).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    expected = steps(made)
    fuse_(made)
    calls.clear()
    agree(steps(made), expected)
    assert calls == [1, 1, 2, 2, 2, 2]
    routers = [layer.mlp.gate for layer in made.model.layers]
    for router in routers:
        router.norm_topk_prob = not normalized
    assert apart(steps(made)[0], expected[0]) > 1e-4
    for router in routers:
        router.norm_topk_prob = normalized
        router.top_k = 3
    assert apart(steps(made)[0], expected[0]) > 1e-4


def test_the_routers_logits_are_still_given(calls: Calls) -> None:
    made = mixtral("int4:16")
    plain = copy.deepcopy(made)
    fuse_(made)
    calls.clear()
    agree(*(list(last(model, output_router_logits=True).router_logits) for model in (made, plain)))
    assert not calls
    agree(steps(made), steps(plain))


def test_noise_of_a_router_in_training_is_the_modules(calls: Calls) -> None:
    made = mixtral(router_jitter_noise=0.5)
    fuse_(made)
    steps(made)
    made.model.layers[0].mlp.train()
    calls.clear()
    noisy = steps(made)
    assert 2 not in calls
    assert apart(steps(made)[0], noisy[0]) > 1e-4


def test_other_routers_layers_are_left_and_their_experts_fused(runs: Calls) -> None:
    config = models.t.Glm4MoeConfig(
        **models.COMMON, **models.HEADS, moe_intermediate_size=24, n_routed_experts=5, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1,
    )  # fmt: skip
    torch.manual_seed(0)
    made = models.t.AutoModelForCausalLM.from_config(config).eval()
    expected = steps(made)
    fusion = fuse_(made)
    assert fusion.fused["experts"] == ("model.layers.1.mlp.experts",)
    assert fusion.fused.get("layer", ()) in ((), ("model.layers.0",))
    runs.clear()
    agree(steps(made), expected)
    assert runs == [4, 1, 1, 1, 1, 1]


def test_stacks_that_are_no_plain_parameters_are_the_modules(runs: Calls) -> None:
    """What is made anew at every access has no address to keep."""
    plain, fused = pair()
    x, (index, weights) = torch.randn(3, 48), routes(3)

    class Twice(torch.nn.Module):
        def forward(self, matrix: torch.Tensor) -> torch.Tensor:
            return 2 * matrix

    with torch.inference_mode():
        fused(x, index, weights)
    for each in (plain, fused):
        torch.nn.utils.parametrize.register_parametrization(each, "down_proj", Twice())
    runs.clear()
    with torch.inference_mode():
        assert torch.equal(fused(x, index, weights), plain(x, index, weights))
    assert not runs


def test_an_expert_that_was_another_for_a_while_is_itself_again() -> None:
    """Also for numbers of rows that it was not yet asked for, and where the other's memory is free again."""
    plain, fused = pair("int4:16")
    few, many = routes(3, 2, 4), routes(90, 2, 4)
    with torch.inference_mode():
        for index, weights in (few, many):
            kept = fused.down_proj[4]
            fused.down_proj[4] = nn.StoredWeight.encode(Dense((48, 88), "fp32"), torch.full((48, 88), 1e4))
            fused(torch.randn(len(index), 48), index, weights)
            fused.down_proj[4] = kept
        x, last = torch.randn(90, 48), torch.full((90, 2), 4)
        assert apart(fused(x, last, many[1]), plain(x, last, many[1])) < 2e-6


def test_other_shapes_and_numbers_of_experts_are_seen() -> None:
    plain, fused = pair()
    x, (index, weights) = torch.randn(4, 48), routes(4)
    with torch.inference_mode():
        fused(x, index, weights)
        for each in (plain, fused):
            each.gate_up_proj.data = each.gate_up_proj.data[:, :80]
            each.down_proj.data = each.down_proj.data[:, :, :40]
        assert apart(fused(x, index, weights), plain(x, index, weights)) < 2e-6
        for each in (plain, fused):
            each.num_experts, each.config._experts_implementation = 3, "eager"
        index = index.clamp(max=3)
        assert apart(fused(x, index, weights), plain(x, index, weights)) < 2e-6


def test_panels_and_rows_at_one_address_are_told_apart() -> None:
    _, fused = pair("int4:16")
    x, (index, weights) = torch.randn(4, 48), routes(4)
    with torch.inference_mode():
        expected = fused(x, index, weights)
        for _ in range(50):
            for change in (nn.StoredWeight.pack_, nn.StoredWeight.unpack_):
                for module in fused.modules():
                    if isinstance(module, nn.StoredWeight):
                        change(module)
                for parameter in fused.parameters():
                    parameter.data = parameter.data.clone()
                assert torch.equal(fused(x, index, weights), expected)


def test_several_threads_at_once() -> None:
    _, fused = pair("int4:16")
    fused = copy.deepcopy(fused)
    asked = [(torch.randn(tokens, 48), *routes(tokens)) for tokens in (1, 7, 20, 60, 200)]
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with torch.inference_mode():
                for arguments in asked:
                    fused(*arguments)
        except BaseException as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalized", [True, False])
def test_a_new_models_router_is_told_by_itself(normalized: bool, dtype: torch.dtype) -> None:
    """Beside a residual its part is lost in roundings, where all experts still have nearly one weight."""
    config = models.t.Qwen3MoeConfig(**models.COMMON, **models.MIXTURE, **models.HEADS, norm_topk_prob=normalized)
    made = models.t.AutoModelForCausalLM.from_config(config).eval().to(dtype)
    before = models_state(made)
    assert len(fuse_(made).fused["layer"]) == 2
    assert [layer._fusion.normalized for layer in made.model.layers] == [normalized] * 2
    assert all(torch.equal(made.state_dict()[name], value) for name, value in before.items())


def models_state(made: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in made.state_dict().items()}


@pytest.mark.parametrize("std", [0.02, 0.2])
def test_routers_that_choose_or_weigh_otherwise_are_left(std: float) -> None:
    made = models.model("qwen2-moe", torch.bfloat16)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    other = copy.deepcopy(made)
    router = type(made.model.layers[0].mlp.gate)

    class Least(router):
        def forward(self, hidden_states: torch.Tensor) -> Any:
            logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
            probs = torch.nn.functional.softmax(logits, dtype=torch.float, dim=-1)
            weights, index = torch.topk(probs, self.top_k, dim=-1, largest=False)
            return logits, weights.to(logits.dtype), index

    made.model.layers[0].mlp.gate.__class__ = Least
    block = type(other.model.layers[0].mlp)

    class Minus(block):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            x = hidden_states.view(-1, hidden_states.shape[-1])
            shared = F.sigmoid(-self.shared_expert_gate(x)) * self.shared_expert(x)
            _, weights, index = self.gate(x)
            return (self.experts(x, index, weights) + shared).reshape(hidden_states.shape)

    other.model.layers[0].mlp.__class__ = Minus
    for model in (made, other):
        fusion = fuse_(model)
        assert fusion.fused["layer"] == ("model.layers.1",)
        assert "otherwise" in fusion.left["model.layers.0"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_a_router_cannot_weigh_is_shown(value: float, calls: Calls) -> None:
    config = models.t.Qwen3MoeConfig(**models.COMMON, **models.MIXTURE, **models.HEADS, norm_topk_prob=True)
    torch.manual_seed(0)
    made = models.t.AutoModelForCausalLM.from_config(config).eval()
    fuse_(made)
    with torch.inference_mode():
        out = made(TOKENS[:, :4], use_cache=True)
        for parameter in (layer.mlp.gate.weight for layer in made.model.layers):
            parameter[2] = value
        calls.clear()
        assert made(TOKENS[:, 4:5], past_key_values=out.past_key_values).logits.isnan().any()
    assert calls


@pytest.mark.parametrize(("count", "choices"), [(40, 6), (130, 2)])
def test_of_equal_logits_those_are_taken_that_pytorch_takes(count: int, choices: int) -> None:
    more = {**models.MIXTURE, "num_experts": count, "num_experts_per_tok": choices}
    config = models.t.Qwen3MoeConfig(**models.COMMON, **more, **models.HEADS)
    torch.manual_seed(0)
    made = models.t.AutoModelForCausalLM.from_config(config).eval()
    block = made.model.layers[0].mlp
    with torch.inference_mode():
        block.experts.gate_up_proj.normal_()
        block.experts.down_proj.normal_()
        block.gate.weight.copy_(block.gate.weight[torch.arange(count) // 4] * 20)  # four of each
        fused = mixture.mixture(parts.mixture(block), "silu", False, torch.float32)
        for seed in range(20):
            x = torch.randn(1, 1, 48, generator=torch.Generator().manual_seed(seed))
            assert apart(mixture._run(fused, x), block(x)) < 1e-5


def test_large_experts_in_fp32_are_fused(runs: Calls) -> None:
    """Products of many terms differ by more roundings than small ones."""
    made = mixtral(hidden_size=512, intermediate_size=1024, num_hidden_layers=1)
    plain = copy.deepcopy(made)
    assert fuse_(made).fused["experts"] == ("model.layers.0.mlp.experts",)
    agree(steps(made), steps(plain), 2e-5)


def test_other_implementations_and_hooks_on_activations_are_asked(runs: Calls, calls: Calls) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    asked: list[int] = []

    def own(self: Any, hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
        asked.append(len(hidden_states))
        return hidden_states

    made = mixtral()
    fuse_(made)
    steps(made)
    ALL_EXPERTS_FUNCTIONS.register("own", own)
    before = made.config._experts_implementation
    made.set_experts_implementation("own")
    runs.clear()
    calls.clear()
    steps(made)
    assert asked == [4, 4, *[1] * 10]
    made.set_experts_implementation(before)
    seen: list[int] = []
    hook = made.model.layers[0].mlp.experts.act_fn.register_forward_hook(lambda *_: seen.append(1))
    steps(made)
    assert len(seen) >= 6
    hook.remove()
    assert 2 not in calls
    steps(made)
    assert 2 in calls


def test_copies_compute_alike_and_keep_no_addresses(runs: Calls) -> None:
    _, fused = pair("int4:16")
    x, (index, weights) = torch.randn(2, 48), routes(2)
    with torch.inference_mode():
        expected = fused(x, index, weights)
        twin = copy.deepcopy(fused)
        for parameter in fused.parameters():
            parameter.data.zero_()
        runs.clear()
        assert torch.equal(twin(x, index, weights), expected)
        assert runs == [2]


def test_every_instruction_set(monkeypatch: pytest.MonkeyPatch, runs: Calls) -> None:
    plain, fused = pair("int4:16")
    x, (index, weights) = torch.randn(9, 48), routes(9)
    for _ in each_isa(monkeypatch):
        runs.clear()
        with torch.inference_mode():
            assert apart(fused(x, index, weights), plain(x, index, weights)) < 2e-6
        assert runs == [9]


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("stored", ["fp32", "int4:16", "mxfp4"])
def test_experts_of_gpt_oss_are_one_call_once_they_are_stored(
    stored: str, tokens: int, runs: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gate and up cut at their limits, and biases, by every instruction set; and a NaN goes through."""
    made = models.model("gpt-oss")
    plain = fuse_(made)
    assert "convert them first" in plain.left["model.layers.0.mlp.experts"]
    made = models.model("gpt-oss")
    parco.convert_(made, stored)
    whole = copy.deepcopy(made).model.layers[0].mlp.experts
    assert len(fuse_(made).fused["experts"]) == 2
    fused = made.model.layers[0].mlp.experts
    x, (index, weights) = 30 * torch.randn(tokens, 48), routes(tokens)
    gate_up = whole.gate_up_proj[int(index[0, 0])](x[:1])
    assert gate_up.abs().max() > 7
    for isa in each_isa(monkeypatch):
        runs.clear()
        with torch.inference_mode():
            assert apart(fused(x, index, weights), whole(x, index, weights)) < 2e-6, isa
            many = stored == "fp32" and tokens == 40  # rows of fp32, which are PyTorch's
            assert runs == ([] if many else [tokens])
            y = fused(x.clone().index_fill_(0, torch.tensor([0]), torch.nan), index, weights)
        assert y[0].isnan().all()
        assert y[1:].isfinite().all()


def test_a_bias_that_is_replaced_is_seen(runs: Calls) -> None:
    made = models.model("gpt-oss")
    parco.convert_(made, "int4:16")
    fuse_(made)
    fused = made.model.layers[0].mlp.experts
    x, (index, weights) = torch.randn(2, 48), routes(2)
    with torch.inference_mode():
        before = fused(x, index, weights)
        runs.clear()
        fused.down_proj_bias.add_(1.0)
        torch.testing.assert_close(fused(x, index, weights), before + weights.sum(1, keepdim=True))
        fused.down_proj_bias = torch.nn.Parameter(fused.down_proj_bias - 1.0)
        torch.testing.assert_close(fused(x, index, weights), before)
        assert runs == [2, 2]
        fused.down_proj_bias = None
        assert apart(fused(x, index, weights), before) > 1e-3
        assert runs == [2, 2, 2]


def test_an_unknown_instruction_set_is_refused() -> None:
    """Code of another one would be an illegal instruction, or wrong without a word."""
    spec, tensors = chains.dense(torch.randn(8, 8))
    product = chains.chain(spec, tensors, None, torch.float32)
    with pytest.raises(ValueError, match="'sse9' is no instruction set"):
        _C.Block(
            isa="sse9",
            gate_up=[product],
            down=product,
            gated=False,
            activation=0,
            limit=1.0,
            slope=1.0,
            raised=0.0,
        )
