import itertools

import pytest
import torch

from parco import decode, encode
from parco.products import Activations, Native, Split, certificate, matmul, parse
from parco.products.certificate import relative_bound
from parco.products.split import words

SPLITS = [Split(order) for order in (2, 3, 4, 5)]


def operands(shape=(24, 300, 20), span=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    rows, inner, columns = shape

    def matrix(*shape):
        x = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
        return (x * torch.exp(span * torch.randn(shape, generator=generator, dtype=torch.float64))).to(dtype)

    return matrix(rows, inner), matrix(inner, columns)


def componentwise_error(c, a, b):
    """max |C - AB| / |A||B| with AB in fp64."""
    wide_a, wide_b = a.to(torch.float64), b.to(torch.float64)
    return ((c.to(torch.float64) - wide_a @ wide_b).abs() / (wide_a.abs() @ wide_b.abs())).max().item()


def test_words_sum_to_the_number_and_are_bf16():
    bits = torch.randint(0x00800000 + (40 << 23), 0x7F000000, (100_000,), dtype=torch.int32)
    x = bits.view(torch.float32)
    parts = words(x)
    assert len(parts) == 3
    assert all(torch.equal(part, part.to(torch.bfloat16).to(torch.float32)) for part in parts)
    assert torch.equal(sum(part.to(torch.float64) for part in parts), x.to(torch.float64))
    for big, small in itertools.pairwise(parts):
        assert (small.abs() <= big.abs() * 2.0**-8 * (1 + 2.0**-7)).all()


def test_pairs():
    assert [len(how.pairs) for how in SPLITS] == [3, 6, 8, 9]
    assert Split(2).pairs == ((0, 1), (1, 0), (0, 0))


@pytest.mark.parametrize("how", [Native(), *SPLITS], ids=str)
@pytest.mark.parametrize("span", [0.0, 4.0, 12.0])
def test_the_bound_holds(how, span):
    a, b = operands(span=span)
    certified = certificate(a, b, how, samples=200)
    assert certified.used <= 1
    # Every entry, not only the sampled ones.
    assert componentwise_error(matmul(a, b, how), a, b) <= certified.relative
    assert certified.measured <= certified.relative


@pytest.mark.parametrize("span", [0.0, 4.0])
def test_split_3_is_of_fp32_grade_and_split_2_is_not(span):
    a, b = operands((64, 512, 48), span=span)
    native = componentwise_error(matmul(a, b), a, b)
    fine, coarse = (componentwise_error(matmul(a, b, how), a, b) for how in (Split(3), Split(2)))
    # Six products leave out at most 2 * 2**-24 of |A||B|, two unit roundoffs of fp32.
    assert fine <= 2 * native + 2.0**-23
    assert 4 * native < coarse < 2.0**-14


def test_low_words_survive_at_both_ends_of_the_range():
    a, b = operands()
    expected = matmul(a, b, Split(3))
    for exponent in (-100, 100, 120):
        scaled = matmul(a * 2.0**exponent, b * 2.0**-100, Split(3))
        assert torch.equal(scaled, expected * 2.0 ** (exponent - 100))
    # Rows that are subnormal throughout have fewer bits, and give what those are worth.
    tiny = torch.full((1, 8), 2.0**-140)
    assert torch.equal(matmul(tiny, torch.full((8, 1), 2.0**120), Split(3)), torch.tensor([[2.0**-17]]))


def test_rows_without_numbers():
    a, b = operands()
    a[3] = 0
    assert torch.equal(matmul(a, b, Split(3))[3], torch.zeros(b.shape[1]))
    a[5, 7], b[0, 2] = torch.inf, torch.nan
    c = matmul(a, b, Split(3))
    assert torch.isnan(c[5]).all()
    assert torch.isnan(c[:, 2]).all()
    keep = torch.ones_like(c, dtype=torch.bool)
    keep[5], keep[:, 2] = False, False
    assert torch.isfinite(c[keep]).all()


@pytest.mark.parametrize("how", [Native(), Split(3)], ids=str)
def test_batches_and_gradients(how):
    a, b = operands((6, 40, 5))
    a = torch.stack([a, 2 * a]).requires_grad_()
    b.requires_grad_()
    c = matmul(a, b, how)
    expected = torch.matmul(a, b)
    torch.testing.assert_close(c, expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(c)
    got = torch.autograd.grad(c, (a, b), grad)
    want = torch.autograd.grad(expected, (a, b), grad)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_operands_are_widened(dtype):
    a, b = operands(dtype=dtype)
    c = matmul(a, b, Split(3))
    assert c.dtype == dtype
    exact = (a.to(torch.float64) @ b.to(torch.float64)).to(dtype)
    torch.testing.assert_close(c, exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_low_precision_of_fp32_matrices_does_not_touch_a_split():
    a, b = operands((16, 200, 16))
    expected = matmul(a, b, Split(5))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert relative_bound(200, torch.float32, Native()) > 2.0**-8
        loose = certificate(a, b, Native())
        split = matmul(a, b, Split(5))
    finally:
        torch.set_float32_matmul_precision(before)
    assert loose.used <= 1
    assert componentwise_error(split, a, b) <= relative_bound(200, torch.float32, Split(5))
    torch.testing.assert_close(split, expected, rtol=1e-5, atol=1e-6)


def test_certificate_measures_what_it_is_given():
    a, b = operands()
    wrong = matmul(a, b) * 1.01
    certified = certificate(a, b, Native(), result=wrong)
    assert certified.used > 1
    assert certified.measured > certified.relative
    assert "24x300x20" in str(certified)
    assert certificate(a, b).invariant_to == {"run"}
    assert torch.equal(matmul(a, b, Split(3)), matmul(a, b, Split(3)))


def test_certificate_in_fp64_is_exact():
    a, b = operands(dtype=torch.float64)
    certified = certificate(a, b)
    assert 0 < certified.measured <= certified.relative < 1e-13
    # Cancellation: 1 - 1 + 2**-60 is found, which fp64 arithmetic in this order would not.
    row = torch.tensor([[1 + 2.0**-30, -(1 + 2.0**-29)]], dtype=torch.float64)
    column = torch.tensor([[1 + 2.0**-30], [1.0]], dtype=torch.float64)
    result = torch.tensor([[2.0**-60]], dtype=torch.float64)
    assert certificate(row, column, result=result).measured == 0


@pytest.mark.parametrize("how", [Native(), *SPLITS], ids=str)
def test_text(how):
    assert parse(str(how)) == how
    assert parse(how) is how
    a, b = operands((4, 8, 3))
    assert torch.equal(matmul(a, b, str(how)), matmul(a, b, how))


def test_refusals():
    a, b = operands((4, 8, 3))
    with pytest.raises(ValueError, match=r"unknown product 'strassn\(1\)': known are native"):
        matmul(a, b, "strassn(1)")
    with pytest.raises(ValueError, match=r"Split\(1\)"):
        Split(1)
    with pytest.raises(ValueError, match=r"a is \(4, 8\), b is \(3, 8\)"):
        matmul(a, b.t())
    with pytest.raises(TypeError, match=r"float64.*split\(3\) takes"):
        matmul(a.double(), b.double(), Split(3))
    with pytest.raises(TypeError, match="both must have one dtype"):
        matmul(a, b.double())
    with pytest.raises(TypeError, match="certificate needs"):
        certificate(a.half(), b.half())
    with pytest.raises(ValueError, match="samples=0"):
        certificate(a, b, samples=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_activations_are_rounded_per_row_and_gradients_pass_straight_through(dtype):
    a, b = (matrix.to(dtype) for matrix in operands())
    rounded = decode(encode(a, "int8:row"))
    expected = (rounded @ b.float()).to(dtype)
    a.requires_grad_(), b.requires_grad_()
    c = matmul(a, b, "activations(int8)")
    assert torch.equal(c, expected)
    assert not torch.equal(c, matmul(a, b))
    g = torch.ones_like(c)
    grad_a, grad_b = torch.autograd.grad(c, (a, b), g)
    assert torch.equal(grad_a, (g.float() @ b.detach().float().T).to(dtype))
    assert torch.equal(grad_b, (rounded.T @ g.float()).to(dtype))


@pytest.mark.parametrize("span", [0.0, 4.0])
def test_the_certificate_of_int8_activations_holds(span):
    a, b = operands(span=span)
    certified = certificate(a, b, Activations(), samples=200)
    assert 0.01 < certified.used <= 1
    assert certified.measured > certified.relative  # the rounding to int8 is no share of |A||B|
    assert "activations(int8)" in str(certified)


def test_activations_parse_and_refuse_other_formats():
    assert parse("activations(int8)") == Activations()
    assert parse(str(Activations())) == Activations()
    with pytest.raises(ValueError, match="int8 or not at all"):
        Activations("int4")
    for text in ("activations", "split(x)", "activations()"):
        with pytest.raises(ValueError, match="unknown product"):
            parse(text)
    a, b = operands()
    a[2, 5] = float("inf")
    assert matmul(a, b, Activations())[2].isnan().all()
    with pytest.raises(TypeError):
        matmul(a.double(), b.double(), Activations())
