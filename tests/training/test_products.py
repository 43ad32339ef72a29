"""Every product of every recipe is what its definition says, forward and backward."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch

from parco import _C, machine
from parco.formats import NAMES, Float, ScaleDelayed
from parco.kernels.cast import Hadamard, decode, encode
from parco.kernels.linear import linear_both
from parco.kernels.linear.dense import compiled
from parco.training import RECIPES, Operand, Pair, Recipe, linear, prepare_, products
from parco.training.operands import estimator, has_bf16, write

SHAPES = [(96, 64, 48), (33, 50, 17), (1, 16, 16), (130, 257, 40)]


def oracle(operand: Operand, x: torch.Tensor, seed: int, sign_seed: int) -> torch.Tensor:
    """The operand's numbers in fp64, of x [M, R] with R summed over."""
    if operand.hadamard:
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % operand.hadamard))
        x = Hadamard(operand.hadamard, sign_seed)(x)
    given, beyond = {}, 0.0
    if isinstance(operand.format.scale, ScaleDelayed):
        assert isinstance(operand.format.element, Float)
        given["scale"] = (x.abs().amax().float() / operand.format.element.max).reshape(1, 1)
    if operand.clamp:
        count = math.floor((1 - operand.clamp) * x.shape[1] + 1e-9)
        ascending = x.sort(dim=1).values
        bounded = x.clamp(ascending[:, count : count + 1], ascending[:, x.shape[1] - 1 - count :][:, :1])
        beyond, x = (x.float() - bounded.float()).double(), bounded
    written = encode(x.contiguous(), operand.format, rounding=operand.rounding, seed=seed, **given)
    return decode(written).double() + beyond


def slope(operand: Operand, weight: torch.Tensor) -> torch.Tensor:
    """What the estimator multiplies the weight's gradient with, number by number: here for scales per row."""
    if not operand.dge:
        return torch.ones(weight.shape, dtype=torch.float64)
    grid = sorted({abs(value) for value in operand.format.element.values()})
    scaled = (weight.float() / encode(weight, operand.format).tensors["scale"]).double()

    def derivative(value: float) -> float:
        value = min(abs(value), grid[-1])
        least, most = next((a, b) for a, b in itertools.pairwise(grid) if a <= value < b or b == grid[-1])
        offset = abs(2 * (value - least) / (most - least) - 1)
        return min(offset ** (1 / operand.dge - 1) / operand.dge, 3.0) if offset else 3.0

    return torch.tensor([[derivative(value) for value in row] for row in scaled.tolist()], dtype=torch.float64)


def expected(recipe: Recipe, x, weight, grad, seed):
    """y, grad_x and grad_weight in fp64 with |left| |right| of each, from the definition alone."""
    torch.manual_seed(seed)

    def drawn(wanted: object) -> int:
        return int(torch.randint(1 << 62, ())) if wanted else 0

    def written(operand: Operand, x: torch.Tensor, signs: int) -> torch.Tensor:
        return oracle(operand, x, drawn(operand.rounding == "stochastic"), signs)

    def product(pair: Pair, left: torch.Tensor, right: torch.Tensor, before: torch.Tensor | None = None):
        """The product's signs are drawn first, then the seed of its right operand, which may be as `before`."""
        signs = drawn(pair.left.hadamard)
        turned = written(pair.right, right, signs) if before is None or not pair.right.reused else before.T
        return written(pair.left, left, signs), turned

    results = [product(recipe.output, x, weight)]
    forward_x, forward_weight = results[0]
    results.append(product(recipe.grad_input, grad, weight.T, forward_weight))
    results.append(product(recipe.grad_weight, grad.T, x.T, forward_x))
    factors = (1.0, 1.0, slope(recipe.output.right, weight))
    return [(a @ b.T * factor, a.abs() @ b.abs().T * factor) for (a, b), factor in zip(results, factors, strict=True)]


OWN = {
    "transforms everywhere": "output=mxfp4+stochastic+hadamard16 @ mxfp4+stochastic+hadamard16; "
    "grad_input=mxfp8_e5m2+hadamard32 @ mxfp4+hadamard32; grad_weight=nvfp4+hadamard64 @ int4:32+stochastic+hadamard64",
    "bf16 transformed": "output=bf16+hadamard16 @ bf16+hadamard16; grad_input=fp32 @ bf16+stochastic; "
    "grad_weight=fp16 @ int8:row",
    "clamped everywhere": "output=int8:row+clamp0.95 @ fp6_e3m2:row+dge3; "
    "grad_input=nvfp4+stochastic+clamp0.9 @ mxfp8_e4m3+clamp0.99; "
    "grad_weight=bf16 @ int8:row+clamp0.95+reused",
}


@pytest.mark.parametrize("name", [*RECIPES, *OWN])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_product_is_its_definition(name, shape, dtype):
    assert_is_its_definition(name, shape, dtype)


def assert_is_its_definition(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    recipe, (tokens, columns, outputs) = Recipe.parse(OWN.get(name, name)), shape
    generator = torch.Generator().manual_seed(3)
    draw = lambda *size: torch.randn(size, generator=generator)  # noqa: E731
    x = (draw(tokens, columns) * torch.exp(draw(tokens, 1))).to(dtype).requires_grad_()
    weight, grad = (draw(outputs, columns) / columns**0.5).to(dtype), draw(tokens, outputs).to(dtype) * 1e-3
    layer = torch.nn.Linear(columns, outputs, bias=False, dtype=dtype)
    layer.weight.data.copy_(weight)
    prepare_(layer_in := torch.nn.Sequential(layer), recipe.with_(ends=0))
    torch.manual_seed(11)
    y = layer_in(x)
    y.backward(grad)
    wanted = expected(recipe, x.detach(), weight, grad, 11)
    for found, (value, size) in zip((y, x.grad, layer.weight.grad), wanted, strict=True):
        assert found.dtype == dtype
        # Any order of an fp32 sum is within terms * 2^-24 of |a||b|; one rounding to the dtype comes on top.
        # Where a scaled weight is near an interval's middle or end, its slope in fp32 has some 2^-20 more.
        terms = 2 * (size.shape[0] + 512) * 2.0**-24
        assert ((found.double() - value).abs() <= terms * size + torch.finfo(dtype).eps * value.abs() + 1e-37).all()


ON_TILES = {
    "fp16": 0, "fp8-block": 0, "int8": 0, "bitnet": 2, "fp4-dge": 0, "transforms everywhere": 2,
    "bf16 transformed": 1, "clamped everywhere": 0,
}  # fmt: skip
"""Products of bf16 numbers, where they are not all three; those of int8 take integers."""


@pytest.fixture
def tiles(monkeypatch):
    """The calls of bf16 products on AMX tiles, whose instructions are written in C++ here."""
    if "avx512_vbmi" not in machine.detect().isas:
        pytest.skip("the tiles' instructions are written with AVX-512 VBMI")
    calls, kernel = [], compiled(_C.linear_dense_amx_emulated)

    def run(a, b, bias=None, dtype=None):
        assert a.dtype == b.dtype == torch.bfloat16
        calls.append(dtype)
        return kernel(a, b, bias, dtype=dtype)

    monkeypatch.setattr(products, "has_tiles", lambda device: True)
    monkeypatch.setattr(products, "linear_dense", run)
    return calls


@pytest.mark.parametrize("name", [*RECIPES, *OWN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_product_is_its_definition_on_tiles(name, dtype, tiles):
    assert_is_its_definition(name, (130, 257, 40), dtype)
    assert len(tiles) == ON_TILES.get(name, 3)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_in_bf16_are_the_formats_own(name):
    """Of every format, under every scale: to the one rounding of the scale that is kept apart."""
    operand = Operand.parse(name)
    if operand.is_delayed:
        pytest.skip("its scale is not its own")
    torch.manual_seed(0)
    x = torch.randn(48, 96) * torch.exp(3 * torch.randn(48, 1))
    written = write(operand, x)
    found = written.in_bf16()
    assert (found is not None) == has_bf16(operand.format)
    if found is not None:
        numbers, scale = found
        assert numbers.dtype == torch.bfloat16
        whole = numbers.double() if scale is None else numbers.double() * scale
        exact = written.numbers().double()
        assert ((whole - exact).abs() <= 2.0**-23 * exact.abs()).all()


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4"])
def test_numbers_that_tiles_take_for_zero_are_not_given_to_them(name):
    operand = Operand.parse(name)
    element = operand.format.element
    least = -126 - (element.least_exponent - element.mantissa_bits)
    x = torch.zeros(4, 64)
    x[1, 3], x[1, 4] = element.max * 2.0**least, 2.0**-126  # a code of 1 under the least scale that tiles can take
    assert write(operand, x).in_bf16() is not None
    assert write(operand, x).numbers()[1, 4] == 2.0**-126
    assert write(operand, x / 2).in_bf16() is None


def test_a_product_with_numbers_that_tiles_take_for_zero_is_right(tiles):
    operand = Operand.parse("mxfp8_e4m3")
    torch.manual_seed(0)
    left, right = write(operand, torch.randn(20, 64) * 2.0**-120), write(operand, torch.randn(30, 64) * 2.0**20)
    expected = left.numbers().double() @ right.numbers().double().T
    assert torch.allclose(products.multiply(left, right, torch.float32).double(), expected, rtol=1e-5, atol=1e-36)
    assert not tiles


def test_what_turns_is_written_once(monkeypatch):
    """x and the gradient for both of their products, W before and after."""
    written = []
    before = products.write
    monkeypatch.setattr(products, "write", lambda each, x, **how: written.append(x.shape) or before(each, x, **how))
    for name, count in (("fp8-current", 4), ("fp8-delayed", 4), ("bf16", 4), ("mxfp8", 6), ("nvfp4", 6)):
        layer = torch.nn.Linear(32, 16)
        prepare_(torch.nn.Sequential(layer), RECIPES[name].with_(ends=0))
        del written[:]
        layer(torch.randn(64, 32, requires_grad=True)).square().sum().backward()
        assert len(written) == count, (name, written)


@pytest.mark.parametrize("text", ["fp8_e4m3:tensor", "fp8_e4m3:128x128", "nvfp4:16x16", "int8:tensor", "bf16"])
def test_what_turns_is_the_same_written_turned(text):
    operand = Operand.parse(text)
    assert operand.turns
    x = torch.randn(150, 70) * torch.exp(torch.randn(150, 1))
    assert torch.equal(write(operand, x).numbers().T, write(operand, x, transposed=True).numbers())


@pytest.mark.parametrize("text", ["fp8_e4m3:row", "mxfp8_e4m3", "bf16+stochastic", "fp8_e4m3:tensor+stochastic"])
def test_what_does_not_turn_is_written_anew(text):
    assert not Operand.parse(text).turns


@pytest.mark.parametrize("name", RECIPES)
def test_leading_dimensions_bias_and_no_tokens(name):
    torch.manual_seed(0)
    weight, bias = torch.randn(24, 40, requires_grad=True), torch.randn(24, requires_grad=True)
    recipe = RECIPES[name] if not RECIPES[name].delayed else RECIPES["fp8-current"]
    x = torch.randn(2, 3, 40)
    y = linear(x, weight, bias, recipe)
    assert torch.equal(y, linear(x.reshape(6, 40), weight, None, recipe).reshape(2, 3, 24) + bias)
    empty = linear(x[:, :0], weight, bias, recipe)
    assert empty.shape == (2, 0, 24)
    (y.sum() + empty.sum()).backward()
    assert torch.allclose(bias.grad, torch.full((24,), 6.0))
    assert weight.grad.abs().sum() > 0


def test_the_estimator_of_numbers_beyond_the_grid_is_zero():
    """Of a block up to 7.9 the scale is 1 where it is rounded down, and the grid ends at 6."""
    operand = Operand.parse("mxfp4:floor+dge5")
    weight = torch.zeros(1, 32)
    weight[0, :6] = torch.tensor([7.9, -6.5, 6.0, 4.5, 0.25, -1.0])
    found = estimator(operand, weight, write(operand, weight))[0]
    # 6, 1 and 0 end an interval, 4.5 is half way to the middle of its own, 0.25 in the middle.
    assert found[:6].tolist() == pytest.approx([0, 0, 0.2, 0.2 * 2**0.8, 3, 0.2])
    assert found[6:].tolist() == pytest.approx([0.2] * 26)
    assert estimator(operand, torch.zeros(1, 32), write(operand, torch.zeros(1, 32)))[0, 0] == pytest.approx(0.2)


def test_residuals_are_few_and_complete():
    torch.manual_seed(2)
    x = torch.randn(64, 400)
    x[:, 7] = 50 * x[:, 7].sign()
    operand = Operand.parse("fp4_e2m1:row+clamp0.99")
    written = write(operand, x)
    assert written.values.shape == (64, 8)
    assert (written.columns == 7).any(1).all()
    plain = decode(encode(x, operand.format))
    assert (written.numbers() - x).square().sum() < 0.1 * (plain - x).square().sum()
    assert torch.equal(written.numbers()[:, 7].sign(), x[:, 7].sign())


def test_a_product_that_is_not_asked_for_is_not_computed(monkeypatch):
    weight = torch.randn(16, 32)
    calls = []
    before = products.Step.product
    monkeypatch.setattr(
        products.Step, "product", lambda step, name, *a, **k: calls.append(name) or before(step, name, *a, **k)
    )
    x = torch.randn(8, 32, requires_grad=True)
    linear(x, weight, None, RECIPES["nvfp4"]).sum().backward()
    assert calls == ["grad_input"]


def kept_bytes(layer: torch.nn.Module, x: torch.Tensor) -> int:
    """Bytes that the forward of `layer` keeps for its backward, besides parameters."""
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    parameters = {p.data_ptr() for p in layer.parameters()}
    return sum(t.nbytes for t in kept if t.data_ptr() not in parameters)


def test_activations_are_kept_in_the_recipes_format():
    share = {"bf16": 1, "fp8-current": 0.51, "mxfp8": 0.52, "nvfp4": 0.29, "int8": 0.51}
    for name, most in share.items():
        layer = torch.nn.Linear(256, 128)
        prepare_(torch.nn.Sequential(layer), RECIPES[name].with_(ends=0))
        kept = kept_bytes(layer, torch.randn(512, 256, requires_grad=True))
        assert 0 < kept <= most * 2 * 512 * 256


def test_an_fp16_gradient_that_overflows_becomes_infinite():
    weight = torch.ones(16, 16, requires_grad=True)
    x = torch.ones(4, 16, requires_grad=True)
    linear(x, weight, None, RECIPES["fp16"]).backward(torch.full((4, 16), 1e30))
    assert torch.isinf(x.grad).all()
    assert torch.isinf(weight.grad).all()


@pytest.mark.parametrize("name", RECIPES)
def test_nan_reaches_what_it_belongs_to(name):
    layer = torch.nn.Linear(32, 16)
    prepare_(torch.nn.Sequential(layer), RECIPES[name].with_(ends=0))
    layer(torch.randn(64, 32)).sum().backward()  # a delayed scale is known from here on
    x = torch.randn(64, 32)
    x[3, 5] = torch.nan
    assert torch.isnan(layer(x)[3]).all()


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_a_gradient_is_unbiased(name):
    """Over many draws the mean of grad_x is the product with the unrounded gradient."""
    recipe = RECIPES[name]
    torch.manual_seed(1)
    weight, grad = torch.randn(32, 16), torch.randn(4, 32)
    x = torch.randn(4, 16, requires_grad=True)
    draws = torch.stack([torch.autograd.grad(linear(x, weight, None, recipe), x, grad)[0] for _ in range(400)]).double()
    exact = grad.double() @ oracle(recipe.grad_input.right, weight.T, 0, 0).T
    error = draws.std(0) / 400**0.5
    assert (draws.std(0) > 0).all()
    assert ((draws.mean(0) - exact).abs() <= 5 * error + 1e-6).all()


def test_results_do_not_depend_on_threads():
    weight, x, grad = torch.randn(64, 96), torch.randn(200, 96), torch.randn(200, 64)
    found = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(4)
            w = weight.clone().requires_grad_()
            y = linear(x, w, None, RECIPES["int8"])
            y.backward(grad)
            found.append((y.detach(), w.grad))
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_delayed_scales_come_from_the_steps_before():
    layer = torch.nn.Linear(32, 16, bias=False)
    prepare_(torch.nn.Sequential(layer), "fp8-delayed")
    x = torch.randn(64, 32)
    layer(x).sum().backward()
    assert layer.x_scale.item() == pytest.approx(x.abs().max().item() / 448)
    assert layer.weight_scale.item() == pytest.approx(layer.weight.abs().max().item() / 448)
    assert layer.grad_scale.item() == pytest.approx(1 / 57344)
    # Four times as large, under the scale of before: what exceeds it saturates.
    big = layer(4 * x)
    limit = 448 * layer.x_scale
    weight = decode(encode(layer.weight, "fp8_e4m3:tensor:delayed", scale=layer.weight_scale))
    clamped = decode(encode((4 * x).clamp(-limit, limit), "fp8_e4m3:tensor:delayed", scale=layer.x_scale))
    assert torch.allclose(big, clamped @ weight.T, rtol=1e-5, atol=1e-5)
    big.sum().backward()
    assert layer.x_scale.item() == pytest.approx(4 * x.abs().max().item() / 448)
    assert set(layer.state_dict()) == {
        "weight",
        *(f"{role}_{part}" for role in ("x", "weight", "grad") for part in ("scale", "history")),
    }
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))


def test_scales_that_are_missing_and_x_that_does_not_fit():
    weight = torch.randn(16, 32)
    with pytest.raises(ValueError, match="scales= are needed"):
        linear(torch.randn(4, 32), weight, None, RECIPES["fp8-delayed"])
    with pytest.raises(ValueError, match="its last dimension must be 32"):
        linear(torch.randn(4, 31), weight, None, RECIPES["bf16"])


@pytest.mark.parametrize("name", RECIPES)
def test_a_gradient_that_is_not_finite_reaches_the_loss_scaler(name):
    for value in (torch.inf, -torch.inf, torch.nan):
        layer = torch.nn.Linear(32, 16)
        prepare_(torch.nn.Sequential(layer), RECIPES[name].with_(ends=0))
        x = torch.randn(64, 32, requires_grad=True)
        grad = torch.randn(64, 16)
        grad[5, 3] = value
        layer(x).backward(grad)
        assert not layer.weight.grad.isfinite().all()
        assert not x.grad.isfinite().all()


def test_an_overflow_does_not_freeze_a_delayed_scale():
    layer = torch.nn.Linear(32, 16, bias=False)
    prepare_(torch.nn.Sequential(layer), "fp8-delayed")
    x = torch.randn(64, 32)
    layer(x).backward(torch.full((64, 16), torch.inf))
    layer.zero_grad()
    for _ in range(2):
        layer(x).backward(torch.full((64, 16), 1e-7))
    assert layer.grad_scale.item() == pytest.approx(1e-7 / 57344)


def test_evaluation_between_steps_changes_nothing():
    found = []
    for evaluates in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(32, 16)
        prepare_(torch.nn.Sequential(layer), RECIPES["nvfp4"].with_(ends=0))
        x = torch.randn(64, 32)
        if evaluates:
            layer.eval()
            with torch.no_grad():
                layer(x)
            layer.train()
        layer(x).square().sum().backward()
        found.append(layer.weight.grad)
    assert torch.equal(*found)


def test_int8_rounds_the_operands_own_numbers():
    weight, x = torch.randn(16, 32), torch.randn(8, 32).to(torch.bfloat16) * 1e6
    with torch.autocast("cpu", torch.float16):
        y = linear(x, weight * 1e-6, None, RECIPES["int8"])
    assert y.dtype == torch.float16
    assert y.isfinite().all()


def test_numbers_that_are_no_floats_are_refused():
    for x, weight in (
        (torch.ones(4, 32, dtype=torch.int64), torch.randn(16, 32)),
        (torch.randn(4, 32), torch.randn(16, 32, dtype=torch.complex64)),
    ):
        with pytest.raises(TypeError, match="both must be floating point"):
            linear(x, weight, None, RECIPES["bf16"])


@pytest.mark.parametrize(("name", "products_by_codes"), [("nvfp4", 3), ("mxfp4", 3), ("mxfp8", 0), ("fp4-dge", 0)])
def test_two_operands_of_4_bits_are_multiplied_as_codes(
    name: str, products_by_codes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[torch.Size] = []

    def counting(x_codes: torch.Tensor, *others: object) -> torch.Tensor:
        taken.append(x_codes.shape)
        return linear_both(x_codes, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(products, "linear_both", counting)
    x, weight = torch.randn(33, 50, requires_grad=True), torch.randn(17, 50, requires_grad=True)
    linear(x, weight, None, RECIPES[name]).sum().backward()
    assert len(taken) == (products_by_codes if products.has_bytes(x.device) else 0)


def test_a_turned_operand_is_the_transpose_in_codes_too() -> None:
    for shape in ((32, 48), (33, 50), (1, 7)):
        weight = torch.randn(shape)
        written = dataclasses.replace(write(Operand.parse("nvfp4:16x16"), weight), turned=True)
        codes = written.in_codes()
        assert codes is not None and codes.shape == shape[::-1]
        assert torch.equal(decode(codes), written.numbers())
        assert {name: each.shape for name, each in codes.tensors.items()} == {
            name: spec.shape for name, spec in codes.format.tensors(shape[::-1]).items()
        }


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.float32, torch.float64)], ids=str)
def test_fp64_goes_through(name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(48, 32))
    prepare_(layer, name, filter_fn=lambda *_: True)
    layer.to(dtypes[1])
    x = torch.randn(32, 48, dtype=dtypes[0], requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.dtype and x.grad is not None
    assert x.grad.dtype == x.dtype and all(each.grad.dtype == each.dtype for each in layer.parameters())
