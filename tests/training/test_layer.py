"""A recipe's layer as an operation: what PyTorch asks of one, and a model compiled whole."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from parco.training import RECIPES, Recipe, Watch, linear, prepare_
from parco.training.recipe import known

OWN = {
    "stochastic in bf16": "output=bf16+stochastic @ bf16+stochastic; grad_input=bf16 @ fp32; "
    "grad_weight=bf16+stochastic @ bf16+stochastic",
    "bf16 reused": "output=bf16 @ bf16; grad_input=bf16 @ bf16+reused; grad_weight=bf16 @ bf16+reused",
}


def scales_of(recipe: Recipe) -> list[Tensor]:
    return [each for _ in recipe.delayed for each in (torch.full((1, 1), 0.01), torch.rand(16))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*RECIPES, *OWN])
def test_both_operations_are_what_their_schemas_and_fakes_say(name: str, dtype: torch.dtype) -> None:
    recipe = Recipe.parse(OWN.get(name, name))
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 21, 257).to(dtype), torch.randn(19, 257).to(dtype), torch.randn(19)
    seeds, grad = torch.arange(len(recipe.seeds)), torch.randn(2, 21, 19).to(dtype)
    scales = scales_of(recipe)
    checks = ("test_schema", "test_faketensor")
    for keeps in ((True, True), (False, False)):
        given = (x, weight, bias, seeds, scales, recipe.key, dtype, *keeps)
        torch.library.opcheck(torch.ops.parco.recipe_forward.default, given, test_utils=checks)
    kept = torch.ops.parco.recipe_forward.default(x, weight, bias, seeds, scales, recipe.key, dtype, True, True)[1:]
    for needs in ((True, True, True), (False, True, False)):
        given = (grad, weight, None, kept, seeds, scales, recipe.key, dtype, torch.float32, list(needs), True, True)
        torch.library.opcheck(torch.ops.parco.recipe_backward.default, given, test_utils=checks)


@pytest.mark.parametrize("name", ["nvfp4", "fp8-delayed"])
def test_the_whole_operation_is_what_pytorch_asks_of_one(name: str) -> None:
    recipe = RECIPES[name]
    x, weight = torch.randn(5, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    given = (x, weight, None, torch.arange(len(recipe.seeds)), scales_of(recipe), recipe.key, torch.bfloat16)
    # That a compiled backward changes scales is seen in a whole model below; opcheck compares without gradients.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.parco.recipe_linear.default, given, test_utils=checks)


def trained(model: torch.nn.Module, run: torch.nn.Module, tokens: Tensor) -> list[Tensor]:
    """Losses, parameters, delayed scales and the generator's state after three steps."""
    torch.manual_seed(7)
    losses = []
    for _ in range(3):
        loss = run(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return [*losses, *model.parameters(), *model.buffers(), torch.get_rng_state()]


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "int8", "fp8-delayed"])
def test_a_model_is_one_graph_and_has_the_same_bits(name: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1,
        vocab_size=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    prepare_(model, RECIPES[name].with_(ends=0))
    twin, tokens = copy.deepcopy(model), torch.randint(0, 32, (2, 16))
    plain = trained(model, model, tokens)
    compiled = trained(twin, torch.compile(twin, fullgraph=True, backend="aot_eager"), tokens)  # type: ignore[arg-type]
    assert all(map(torch.equal, plain, compiled))
    assert plain[0] > plain[2]


def test_under_autocast_a_compiled_layer_has_its_dtype() -> None:
    layer = torch.nn.Linear(32, 16)
    prepare_(torch.nn.Sequential(layer), "mxfp8")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, found = torch.randn(8, 32), []
    for run in (layer, compiled):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x)
        y.float().square().sum().backward()
        found.append((y.detach(), layer.weight.grad, layer.bias.grad))
    assert found[1][0].dtype == torch.bfloat16
    assert all(map(torch.equal, *found))


def test_a_step_that_is_watched_breaks_the_graph_and_the_others_do_not() -> None:
    layer = torch.nn.Linear(32, 16)
    prepare_(torch.nn.Sequential(layer), "mxfp8")
    watch = Watch(layer, every=2)
    compiled = torch.compile(layer, backend="aot_eager")
    read = []
    for _ in range(4):
        compiled(torch.randn(8, 32)).sum().backward()
        readings = watch.step()
        read.append(readings is not None and len(readings.operands))
    assert read == [4, False, 4, False]
    torch._dynamo.reset()
    whole = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="disable"):
        whole(torch.randn(8, 32))
    watch.close()
    whole(torch.randn(8, 32))


def test_a_recipe_is_found_by_its_text() -> None:
    own = RECIPES["mxfp8"].with_(grad_weight="bf16 @ bf16")
    assert known(own.key) == known(str(own)) == own
    assert known("nvfp4") == RECIPES["nvfp4"]


def test_draws_follow_the_generator_alone() -> None:
    weight, x = torch.randn(16, 32), torch.randn(8, 32)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        own = weight.clone().requires_grad_()
        for _ in range(2):
            linear(x, own, None, RECIPES["nvfp4"]).sum().backward()
        found.append(own.grad)
    assert torch.equal(*found)
