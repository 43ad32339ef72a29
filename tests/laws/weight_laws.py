"""The laws of a Weight. A test class in `tests/weights/test_laws.py` inherits them and says what to try by name: each a
function that turns a shape (N, K) into a Weight.

class TestMine(WeightLaws):
    makers = {"mine": Mine}

A Weight that takes only some shapes has a class of its own, which overrides `shapes`, `small` and `odd`.
"""

from collections.abc import Callable, Mapping

import pytest
import torch
from safetensors.torch import load, save

from parco import decode, encode, weights
from parco.fitting.latent import Trained
from parco.nn import Linear, StoredWeight
from parco.products import Activations
from parco.weights import Sparse, Weight

Shape = tuple[int, int]
Make = Callable[[Shape], Weight]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def stored_tensors(spec: Weight, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Tensors for `spec` that stand for a matrix with entries of order 1/sqrt(K): every leaf encodes its own random
    matrix, or as much of it as it stores.
    """
    parts = spec.parts()
    if parts:
        return sum((stored_tensors(part, 10 * seed + i + 1) for i, part in enumerate(parts.values())), ())
    matrix = torch.randn(spec.shape, generator=torch.Generator().manual_seed(seed)) / spec.shape[1] ** 0.5
    if isinstance(spec, Sparse):
        matrix *= spec.keep(matrix.abs())
    return spec.encode(matrix)


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_within(spec: Weight, tensors: tuple[torch.Tensor, ...], x: torch.Tensor, y: torch.Tensor) -> None:
    """The first law: y is x Wᵀ within the stated tolerance, in every entry. The reference is computed in fp64."""
    reference = x.double() @ spec.dense(*tensors, dtype=torch.float64).T
    bound = spec.tolerance(x.dtype) * (x.double().abs() @ spec.magnitude(*tensors).double().T)
    # The least subnormal of the dtype: below it a relative bound means nothing.
    floor = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], spec.shape[0])
    excess = ((y.double() - reference).abs() - bound).max().item() if y.numel() else 0.0
    assert excess <= floor, f"{spec}: {excess} beyond the tolerance"


class WeightLaws:
    makers: Mapping[str, Make]
    shapes: tuple[Shape, ...] = ((33, 50), (1, 17), (130, 129))
    small: Shape = (24, 80)
    odd: Shape = (33, 50)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        metafunc.parametrize("make", list(self.makers.values()), ids=list(self.makers))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_apply_multiplies_by_the_dense_matrix(self, make: Make, dtype: torch.dtype) -> None:
        for shape in self.shapes:
            spec = make(shape)
            tensors = stored_tensors(spec)
            for rows in (1, 5, 40):
                x = inputs(rows, shape[1], dtype=dtype)
                assert_within(spec, tensors, x, spec.apply(x, *tensors))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_apply_by_a_product_is_that_product_with_the_dense_matrix(self, make: Make, dtype: torch.dtype) -> None:
        product = Activations()
        for shape in self.shapes:
            spec = make(shape)
            tensors = stored_tensors(spec)
            x = inputs(12, shape[1], dtype=dtype)
            y, plain = spec.apply(x, *tensors, product=product), spec.apply(x, *tensors)
            assert torch.equal(y, plain) != spec.takes(product)
            assert torch.equal(spec.apply(x, *spec.pack(*tensors), product=product), y)
            if spec.takes(product) and not spec.parts():
                rounded = decode(encode(x, "int8:row"))
                reference = rounded.double() @ spec.dense(*tensors, dtype=torch.float64).T
                bound = spec.tolerance(dtype) * (rounded.abs() @ spec.magnitude(*tensors).T)
                assert ((y.double() - reference).abs() <= bound).all()

    def test_apply_keeps_leading_dimensions_and_adds_the_bias(self, make: Make) -> None:
        spec = make(self.small)
        tensors = stored_tensors(spec)
        rows, columns = self.small
        x, bias = inputs(2, 3, columns), inputs(rows, seed=6)
        assert_within(spec, tensors, x, spec.apply(x, *tensors, bias=bias) - bias)
        assert_within(spec, tensors, x[0, 0], spec.apply(x[0, 0], *tensors))

    def test_apply_takes_an_empty_batch(self, make: Make) -> None:
        spec = make(self.small)
        rows, columns = self.small
        assert spec.apply(inputs(0, columns), *stored_tensors(spec)).shape == (0, rows)
        assert spec.apply(inputs(2, 0, columns), *stored_tensors(spec)).shape == (2, 0, rows)

    def test_apply_takes_a_non_contiguous_input(self, make: Make) -> None:
        spec = make(self.small)
        tensors = stored_tensors(spec)
        n = self.small[1]
        for x in (inputs(n, 6).T, inputs(6, 2 * n)[:, ::2], inputs(1, n).expand(6, n), inputs(6, n + 1)[:, 1:]):
            assert not x.is_contiguous()
            assert_within(spec, tensors, x, spec.apply(x, *tensors))

    def test_gradient_with_respect_to_the_input(self, make: Make) -> None:
        spec = make(self.small)
        tensors = stored_tensors(spec)
        rows, columns = self.small
        x, grad_output = inputs(4, columns).requires_grad_(), inputs(4, rows, seed=7)
        (grad,) = torch.autograd.grad(spec.apply(x, *tensors), x, grad_output)
        # Transposed, the same product is shorter, so the bound of `apply` covers it.
        reference = grad_output.double() @ spec.dense(*tensors, dtype=torch.float64)
        bound = spec.tolerance(torch.float32) * (grad_output.abs() @ spec.magnitude(*tensors))
        assert ((grad - reference).abs() <= bound).all()

    def test_gradient_with_respect_to_the_bias(self, make: Make) -> None:
        spec = make(self.small)
        rows, columns = self.small
        bias, grad_output = inputs(rows).requires_grad_(), inputs(4, rows, seed=7)
        y = spec.apply(inputs(4, columns), *stored_tensors(spec), bias=bias)
        (grad,) = torch.autograd.grad(y, bias, grad_output)
        torch.testing.assert_close(grad, grad_output.sum(0))

    def test_lookup_returns_rows_of_the_dense_matrix(self, make: Make) -> None:
        spec = make(self.odd)
        tensors = stored_tensors(spec)
        last, columns = self.odd[0] - 1, self.odd[1]
        indices = torch.tensor([[0, last, 5], [5, 5, last // 2]])
        rows = spec.lookup(indices, *tensors, dtype=torch.float32)
        # Parts may be multiplied and added in another order: a few units of rounding of what is added up.
        bound = 8 * torch.finfo(torch.float32).eps * spec.magnitude(*tensors)[indices]
        assert rows.shape == (2, 3, columns)
        assert ((rows - spec.dense(*tensors)[indices]).abs() <= bound).all()
        assert spec.lookup(indices, *tensors, dtype=torch.bfloat16).dtype == torch.bfloat16
        assert spec.lookup(indices[:, :0], *tensors, dtype=torch.float32).shape == (2, 0, columns)
        for outside in (-1, last + 1):
            with pytest.raises(IndexError):
                spec.lookup(torch.tensor([0, outside]), *tensors)

    def test_packed_tensors_are_the_same_matrix(self, make: Make) -> None:
        for shape in (*self.shapes, self.small):
            spec = make(shape)
            tensors = stored_tensors(spec)
            packed = spec.pack(*tensors)
            assert all(torch.equal(a, b) for a, b in zip(spec.unpack(*packed), tensors, strict=True))
            assert all(a is b for a, b in zip(spec.pack(*packed), packed, strict=True))
            assert torch.equal(spec.dense(*packed), spec.dense(*tensors))
            assert torch.equal(spec.magnitude(*packed), spec.magnitude(*tensors))
            indices = torch.tensor([0, shape[0] - 1])
            assert torch.equal(spec.lookup(indices, *packed), spec.lookup(indices, *tensors))
            for rows in (1, 40):
                x = inputs(rows, shape[1], dtype=torch.bfloat16)
                assert torch.equal(spec.apply(x, *packed), spec.apply(x, *tensors))

    def test_tensors_are_what_the_spec_says(self, make: Make) -> None:
        for shape in self.shapes:
            spec = make(shape)
            tensors = stored_tensors(spec)
            assert [(tuple(t.shape), t.dtype) for t in tensors] == [(s.shape, s.dtype) for s in spec.tensors().values()]
            assert (
                spec.nbytes == sum(t.untyped_storage().nbytes() for t in tensors) == StoredWeight(spec, tensors).nbytes
            )

    def test_magnitude_bounds_the_dense_matrix(self, make: Make) -> None:
        spec = make(self.odd)
        tensors = stored_tensors(spec)
        assert (spec.magnitude(*tensors) * (1 + 1e-5) >= spec.dense(*tensors).abs()).all()

    def test_text_round_trip(self, make: Make) -> None:
        spec = make(self.odd)
        again = weights.parse(str(spec))
        assert again == spec
        assert hash(again) == hash(spec)
        assert again != make(self.shapes[-1])

    def test_safetensors_round_trip(self, make: Make) -> None:
        spec = make(self.odd)
        layer = Linear(StoredWeight(spec, stored_tensors(spec)))
        loaded = Linear(StoredWeight.empty(weights.parse(str(spec))))
        loaded.load_state_dict(load(save(layer.state_dict())))
        x = inputs(3, self.odd[1])
        assert torch.equal(loaded(x), layer(x))
        assert list(layer.state_dict()) == [f"weight.{name}" for name in spec.tensors()]

    def test_meta_device(self, make: Make) -> None:
        spec = make(self.odd)
        layer = Linear(StoredWeight.empty(spec, dtype=torch.bfloat16, device="meta"))
        assert layer.weight.device.type == "meta"
        assert layer.weight.nbytes == spec.nbytes
        y = layer(torch.empty(4, self.odd[1], dtype=torch.bfloat16, device="meta"))
        assert (y.shape, y.dtype, y.device.type) == ((4, self.odd[0]), torch.bfloat16, "meta")

    def test_parts_put_together_again(self, make: Make) -> None:
        spec = make(self.odd)
        parts = tuple(spec.parts().values())
        if parts:
            assert spec.with_parts(*parts) == spec
            tensors = stored_tensors(spec)
            start = 0
            for name, part in spec.parts().items():
                own = tensors[start : start + len(part.tensors())]
                start += len(own)
                inside = spec.inside(name, spec.dense(*tensors), *tensors)
                if inside is not None:
                    torch.testing.assert_close(inside, part.dense(*own), rtol=1e-4, atol=1e-5)
            with pytest.raises(TypeError):
                spec.encode(torch.zeros(self.odd))
        else:
            with pytest.raises(TypeError):
                spec.with_parts(spec)

    def test_healing_multiplies_and_looks_up_as_the_weight_does(self, make: Make) -> None:
        """`Trained` begins where the stored tensors are, whatever the composition."""
        spec = make(self.odd)
        stored = StoredWeight(spec, stored_tensors(spec))
        trained = Trained(torch.Generator().manual_seed(0))
        trained.add(stored, None)
        x, indices = inputs(3, self.odd[1]), torch.tensor([0, self.odd[0] - 1])
        assert_within(spec, stored.tensors(), x, trained.product(stored, x).detach())
        bound = 8 * torch.finfo(torch.float32).eps * spec.magnitude(*stored.tensors())[indices]
        assert ((trained.rows(stored, indices) - stored.dense()[indices]).abs() <= bound).all()
