"""The product with low-rank factors: one operation where it can be, else in two halves around the layer's own product,
these against the same in plain operations, in values, gradients and memory.
"""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import parco
from parco import adapters
from parco.adapters.product import dropped, enter, leave
from parco.kernels.linear import linear_dense
from parco.training import prepare_


def operands(dtype, rows=37, columns=24, outputs=31, rank=5):
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, columns), (outputs, columns), (outputs,), (rank, columns), (outputs, rank))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def ours(x, weight, bias, a, b, p=0.0):
    x, t = enter(x, a, p)
    return leave(functional.linear(x, weight, bias), t, b, 0.7)


def plain(x, weight, bias, a, b, mask=None):
    return functional.linear(x, weight, bias) + 0.7 * (x if mask is None else x * mask) @ a.T @ b.T


def gradients(function, tensors, trained):
    leaves = [tensor.clone().requires_grad_(index in trained) for index, tensor in enumerate(tensors)]
    y = function(*leaves)
    (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)).sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)]


@pytest.mark.parametrize("trained", [(0, 3, 4), (3, 4), (0, 3), (0, 4), (0, 1, 2, 3, 4), (3,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_are_those_of_plain_operations(dtype, trained):
    tensors = operands(dtype)
    # Sums of some 40 terms of size 1, in another order; a gradient is a sum of 37 rows of them.
    tolerance = 400 * torch.finfo(dtype).eps
    for found, expected in zip(gradients(ours, tensors, trained), gradients(plain, tensors, trained), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 10)


def test_16_bits_round_as_often_as_they_may():
    """y is rounded after the product and after the sum, t once: three units of y's size, and of t's through B."""
    tensors = operands(torch.bfloat16)
    found = gradients(lambda x, w, bias, a, b: ours(x, w, bias, a.float(), b.float()), tensors, (0, 3, 4))
    expected = gradients(plain, [each.double() for each in tensors], (0, 3, 4))
    assert found[0].dtype == torch.bfloat16
    for mine, exact in zip(found, expected, strict=True):
        assert (mine.double() - exact).norm() < 0.01 * exact.norm()


def test_the_sums_are_made_in_the_products_own_memory():
    """Forward into y, backward into the gradient that the product made of x."""
    x, weight, bias, a, b = operands(torch.float32)
    made = {}

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            made["y"] = functional.linear(x, weight, bias)
            return made["y"]

        @staticmethod
        def backward(ctx, grad):
            made["grad"] = grad @ weight
            return made["grad"]

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            made["grad_x"] = grad.data_ptr()
            return grad

    rows, t = enter(Watch.apply(x.requires_grad_()), a.requires_grad_())
    y = leave(Product.apply(rows), t, b.requires_grad_(), 0.7)
    assert y.data_ptr() == made["y"].data_ptr()
    y.sum().backward()
    assert made["grad_x"] == made["grad"].data_ptr()


def test_x_is_kept_once_and_nothing_else_of_its_size():
    x, weight, _, a, b = operands(torch.float32, rows=64, columns=64, outputs=64, rank=2)
    kept = []
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(x, weight, None, a.requires_grad_(), b.requires_grad_(), p=0.25)
    sizes = {tensor.data_ptr() for tensor in kept if tensor.numel() == 64 * 64}
    assert sizes == {x.data_ptr(), weight.data_ptr()}


def test_dropout_is_of_the_factors_alone_and_the_same_for_any_thread_count():
    tensors = operands(torch.float64, rows=300)
    torch.manual_seed(3)
    found = gradients(lambda *each: ours(*each, p=0.3), tensors, (0, 3, 4))
    torch.manual_seed(3)
    seed = int(torch.randint(1 << 62, ()))
    mask = dropped(torch.ones_like(tensors[0]), 0.3, seed)
    expected = gradients(lambda *each: plain(*each, mask=mask), tensors, (0, 3, 4))
    for mine, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, exact)
    assert set(mask.unique().tolist()) == {0.0, 1 / 0.7}
    assert abs((mask == 0).double().mean() - 0.3) < 0.02  # 7,200 draws: 4 standard deviations
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(mask, dropped(torch.ones_like(tensors[0]), 0.3, seed))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(mask[:50], dropped(torch.ones_like(tensors[0][:50]), 0.3, seed))


def test_it_compiles_whole_and_goes_without_gradients():
    tensors = operands(torch.float32)
    expected = plain(*tensors)

    def product(x, weight, bias, a, b):
        x, t = enter(x, a)
        return leave(linear_dense(x, weight, bias), t, b, 0.7)

    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(product(*tensors), expected)
    torch.testing.assert_close(compiled(*tensors), expected)
    for found, exact in zip(gradients(compiled, tensors, (0, 3, 4)), gradients(plain, tensors, (0, 3, 4)), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


def operations(layer, x):
    """The names of parco's operations that a layer's forward is made of."""
    names = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Record():
        layer(x)
    return [name for name in names if name.startswith("parco::linear")]


@pytest.mark.parametrize("method", ["lora(4)", "lora(4, dropout=0.5)", "dora(4)", "vera(4)"])
@pytest.mark.parametrize("base", ["fp32", "bf16", "int4:32", "nf4:64 + factor(rank=8)"])
def test_beside_a_frozen_matrix_it_is_one_operation(base, method):
    dtype = torch.bfloat16 if base == "bf16" else torch.float32
    made = torch.nn.Sequential(torch.nn.Linear(64, 96)).to(dtype)
    if base not in ("fp32", "bf16"):
        parco.convert_(made, base)
    adapters.add_(made, method)
    assert operations(made, torch.randn(3, 64, dtype=dtype))[:1] == ["parco::linear_lora"]
    adapters.set_(made, None)
    assert "parco::linear_lora" not in operations(made, torch.randn(3, 64, dtype=dtype))


def test_beside_a_recipe_and_another_adapter_it_is_two_halves():
    x = torch.randn(3, 64)
    followed = torch.nn.Sequential(torch.nn.Linear(64, 96))
    prepare_(followed, "mxfp8")
    adapters.add_(followed, "lora(4)")
    assert "parco::linear_lora" not in operations(followed, x)
    several = torch.nn.Sequential(torch.nn.Linear(64, 96))
    for name in ("a", "b"):
        adapters.add_(several, "lora(4)", name=name)
        torch.nn.init.normal_(several[0].adapters[name].lora_B)
    adapters.set_(several, {"a": 1.0, "b": 0.5})
    assert operations(several, x) == ["parco::linear_lora"]
    layer = several[0]
    expected = functional.linear(x, layer.weight, layer.bias)
    for name, share in (("a", 1.0), ("b", 0.5)):
        own = layer.adapters[name]
        expected = expected + share * own.method.scale * x @ own.lora_A.T @ own.lora_B.T
    torch.testing.assert_close(several(x), expected)
