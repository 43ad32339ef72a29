"""What the laws do not say: which arguments are refused, and how, and what a Weight is as a value."""

import copy
import pickle

import pytest
import torch

from parco import weights
from parco.weights import Dense, LowRank, Quantized, Scaled, Sum


def test_a_weight_prints_what_it_is():
    factors = LowRank(Quantized("int8:row", (1024, 128)), Quantized("int8:row", (128, 4096)))
    assert str(factors) == "lowrank(quantized(int8:row, 1024x128), quantized(int8:row, 128x4096))"
    assert str(Sum(Dense((2, 3), "bf16"), Dense((2, 3), "fp32"))) == "sum(dense(bf16, 2x3), dense(fp32, 2x3))"
    assert factors.rank == 128


def test_dotted_names_in_order():
    spec = Sum(Quantized("int4:32:asym", (8, 64)), LowRank(Dense((8, 2)), Quantized("int8:row", (2, 64))))
    assert list(spec.tensors()) == ["0.codes", "0.scale", "0.zero", "1.left.values", "1.right.codes", "1.right.scale"]


def test_bytes_are_known_without_tensors():
    # 4 bits each, and a bf16 scale for every 32 of them.
    assert Quantized("int4:32", (1024, 4096)).nbytes == 1024 * 4096 // 2 + 1024 * 128 * 2
    assert Dense((1024, 4096), "bf16").nbytes == 1024 * 4096 * 2


def test_equal_by_value():
    assert Quantized("int4:32", (8, 64)) == Quantized("int4:32:bf16", (8, 64))
    assert len({Dense((2, 3)), Dense((2, 3), "fp32"), Dense((3, 2))}) == 2
    spec = Sum(Quantized("int4:32", (8, 64)), LowRank(Dense((8, 2)), Dense((2, 64))))
    assert copy.deepcopy(spec) == spec == pickle.loads(pickle.dumps(spec))
    with pytest.raises(AttributeError):
        spec.terms = ()


def test_encode_rounds_to_nearest_and_keeps_no_view():
    matrix = torch.randn(8, 64)
    (values,) = Dense((8, 64), "fp32").encode(matrix)
    assert torch.equal(values, matrix)
    assert values.data_ptr() != matrix.data_ptr()
    (values,) = Dense((64, 8), "bf16").encode(matrix.T)
    assert torch.equal(values, matrix.T.bfloat16())
    assert values.is_contiguous()


def test_encode_takes_a_scale():
    spec = Quantized("int4:32", (8, 64))
    matrix = torch.randn(8, 64)
    scale = torch.full((8, 2), 0.25, dtype=torch.bfloat16)
    tensors = spec.encode(matrix, scale=scale)
    assert torch.equal(tensors[1], scale)
    assert torch.equal(spec.dense(*tensors), (matrix / 0.25).round().clamp(-8, 7) * 0.25)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Dense((4, 4), "int8:row"), "Quantized holds the other formats"),
        (lambda: Quantized("bf16", (4, 4)), "Dense"),
        (lambda: Dense((4,)), r"\(4,\)"),
        (lambda: Quantized("int8:row", (0, 4)), r"\(0, 4\)"),
        (lambda: LowRank(Dense((4, 2)), Dense((3, 4))), "as many columns as right has rows"),
        (lambda: Sum(Dense((4, 2))), "two or more"),
        (lambda: Sum(Dense((4, 2)), Dense((2, 4))), r"\(2, 4\)"),
        (lambda: Scaled(Dense((4, 2)), Dense((1, 4))), r"\(1, 2\)"),
        (lambda: Scaled(Dense((4, 2)), Quantized("int8:row", (1, 2))), "takes a Dense"),
        (lambda: weights.parse("scaled(dense(bf16, 4x2))"), "a weight and its scale"),
        (lambda: Dense((4, 2)).encode(torch.zeros(2, 4)), r"\(2, 4\)"),
        (lambda: Quantized("int8:row", (4, 2)).encode(torch.zeros(2, 4)), r"\(2, 4\)"),
        (lambda: weights.parse("dense"), "name\\(arguments\\)"),
        (lambda: weights.parse("sparse(bf16, 2x2)"), "'sparse' is unknown"),
        (lambda: weights.parse("dense(bf16)"), "a format and a shape"),
        (lambda: weights.parse("dense(bf16, 2x)"), "a format and a shape"),
        (lambda: weights.parse("lowrank(dense(bf16, 2x2))"), "takes 2 weights"),
        (lambda: weights.parse("sum(dense(bf16, 2x2), dense(bf16, 2x2)))"), "parentheses"),
        (lambda: weights.parse("quantized(int99:32, 2x2)"), "int99"),
    ],
)
def test_refusals_name_what_was_wrong(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_scale_trains_and_its_matrix_does_not() -> None:
    spec = Scaled(Quantized("int8:row", (8, 16)), Dense((1, 16)))
    codes, step = Quantized("int8:row", (8, 16)).encode(torch.randn(8, 16))
    scale = torch.rand(1, 16, requires_grad=True)
    x, grad = torch.randn(5, 16), torch.randn(5, 8)
    spec.apply(x, codes, step, scale).backward(grad)
    inner = spec.inner.dense(codes, step)
    torch.testing.assert_close(scale.grad, (x * (grad @ inner)).sum(0, keepdim=True))
    assert [part.trains for part in spec.parts().values()] == [False, True]


def test_what_a_matrix_is_inside_a_scale() -> None:
    spec = Scaled(Dense((8, 16)), Dense((1, 16)))
    matrix, scale = torch.randn(8, 16), torch.rand(1, 16) + 0.5
    inner = spec.inside("inner", matrix, matrix, scale)
    torch.testing.assert_close(spec.dense(inner, scale), matrix)
    assert spec.inside("scale", matrix, matrix, scale) is None
    factors = LowRank(Dense((8, 2)), Dense((2, 16)))
    assert factors.inside("left", matrix, matrix[:, :2], matrix[:2]) is None


def test_a_lookup_may_be_in_fp64() -> None:
    for form in ("int4:32", "mxfp4", "fp8_e4m3:128x128"):
        spec = Quantized(form, (40, 64))
        tensors = spec.encode(torch.randn(40, 64))
        rows = spec.lookup(torch.tensor([3, 39]), *tensors, dtype=torch.float64)
        assert rows.dtype == torch.float64
        assert torch.equal(rows, spec.dense(*tensors, dtype=torch.float64)[[3, 39]])
