"""cast_both: what two casts of copies write, from every instruction set. Hadamard transforms are orthogonal."""

from typing import Any

import pytest
import torch
from tests.kernels.cast.test_kernels import DTYPES, compiled
from tests.laws.kernel_laws import KernelLaws
from torch import Tensor

import parco
from parco import formats
from parco.kernels import table
from parco.kernels.cast import Hadamard, decode, encode, encode_both, encode_transposed
from parco.kernels.cast.both import cast_both, fits

FITTING = [name for name in formats.NAMES if fits(formats.parse(name))]


def sample(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows and columns of many sizes, a block of zeros."""
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.exp(2 * torch.randn(rows, 1, generator=generator))
    x[: min(rows, 40), : min(columns, 40)] = 0
    return x.to(dtype)


def factor(name: str, value: float = 0.01) -> Tensor | None:
    return torch.tensor([value]) if name == "nvfp4" else None


@pytest.mark.parametrize("name", FITTING)
def test_every_kernel_writes_what_the_reference_does(name: str) -> None:
    reference = table.operations()["cast_both"].kernels[-1].run
    turn = 0
    for rows, columns in ((64, 96), (300, 70), (1, 17), (33, 600), (128, 256)):
        for rounding in ("nearest", "stochastic"):
            size = (0, 16, 32, 64, 128)[turn % 5]
            straight, transposed = ((True, True), (False, True), (True, False))[turn % 3]
            turn += 1
            x = sample(rows, columns, DTYPES[turn % 3])
            row_size = size if size and columns % size == 0 else 0
            column_size = size if size and rows % size == 0 else 0
            scales = (factor(name) if straight else None, factor(name, 0.02) if transposed else None)
            call = (x, *scales, name, rounding, 5, straight, transposed, row_size, column_size, 2**63 - 9)
            wanted = reference(*call)
            for kernel in compiled("cast_both"):
                for found, expected in zip(kernel.run(*call), wanted, strict=True):
                    assert torch.equal(found, expected), (kernel.name, rows, columns, x.dtype, rounding, size)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transforms_of_every_size_are_the_references(size: int, dtype: torch.dtype) -> None:
    reference = table.operations()["cast_both"].kernels[-1].run
    call = (sample(384, 512, dtype), None, None, "mxfp8_e4m3", "nearest", 0, True, True, size, size, 3)
    wanted = reference(*call)
    for kernel in compiled("cast_both"):
        assert all(torch.equal(found, expected) for found, expected in zip(kernel.run(*call), wanted, strict=True))


@pytest.mark.parametrize(
    "name", ["mxfp4", "nvfp4", "int4:32", "fp8_e4m3:1x128", "fp8_e4m3:row", "int4:32:asym", "bf16"]
)
def test_both_are_encodings_of_the_matrix_and_of_its_transpose(name: str) -> None:
    x = sample(160, 96, torch.float32).reshape(2, 80, 96)
    straight, transposed = encode_both(x, name, rounding="stochastic", seed=4)
    alone = encode_transposed(x, name, rounding="stochastic", seed=4)
    matrix = x.reshape(160, 96)
    for found, wanted in (
        (straight, encode(x, name, rounding="stochastic", seed=4)),
        (transposed, encode(matrix.T, name, rounding="stochastic", seed=4)),
        (alone, transposed),
    ):
        assert found.shape == wanted.shape
        assert list(found.tensors) == list(wanted.tensors)
        for part, tensor in wanted.tensors.items():
            assert torch.equal(found.tensors[part], tensor), part


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int8:row"])
def test_encoding_after_a_transform_is_encoding_the_transformed(name: str) -> None:
    x, hadamard = sample(64, 256, torch.bfloat16), Hadamard(32, seed=7)
    for found, wanted in (
        (encode(x, name, hadamard=hadamard), encode(hadamard(x), name)),
        (encode_transposed(x, name, hadamard=hadamard), encode(hadamard(x.T), name)),
        (encode_both(x, name, hadamard=hadamard)[1], encode(hadamard(x.T), name)),
    ):
        assert all(torch.equal(found.tensors[part], wanted.tensors[part]) for part in wanted.tensors)


def test_threads_do_not_change_the_codes() -> None:
    x = sample(700, 520, torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(cast_both(x, None, None, "mxfp8_e4m3", "stochastic", 9))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_a_transform_is_orthogonal_random_and_spreads_outliers(size: int) -> None:
    hadamard = Hadamard(size, seed=1)
    matrix = hadamard(torch.eye(size))
    # Entries are ±1 / sqrt(size), rounded: each product of two rows errs by at most size * 2 * 2**-24 / size.
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), rtol=0, atol=2.0**-22)
    assert not torch.equal(matrix, Hadamard(size, seed=2)(torch.eye(size)))
    outlier = torch.zeros(1, 2 * size)
    outlier[0, 3] = 100
    spread = hadamard(outlier)
    assert spread[0, :size].abs().min() > 0.99 * 100 / size**0.5
    assert (spread[0, size:] == 0).all()


def test_a_product_along_the_transformed_dimension_stays() -> None:
    generator = torch.Generator().manual_seed(0)
    g, x = (torch.randn(256, 64, generator=generator) for _ in range(2))
    hadamard, exact = Hadamard(16), g.T @ x
    first, second = (decode(encode_transposed(operand, "mxfp8_e4m3", hadamard=hadamard)) for operand in (g, x))
    # Each rounding errs by 2**-4 of a number at most, and by about 2**-5.6 on average; errors are independent.
    assert (first @ second.T - exact).norm() < 2.0**-4 * exact.norm()
    other = decode(encode_transposed(x, "mxfp8_e4m3", hadamard=Hadamard(16, seed=1)))
    assert (first @ other.T - exact).norm() > 0.5 * exact.norm()


def test_wrong_arguments_are_named() -> None:
    x = torch.zeros(64, 48)
    with pytest.raises(ValueError, match="size=8: a Hadamard transform has the size 16, 32, 64, 128"):
        Hadamard(8)
    with pytest.raises(ValueError, match="seed=-1"):
        Hadamard(16, seed=-1)
    with pytest.raises(ValueError, match="needs a multiple of it"):
        Hadamard(32)(x)
    with pytest.raises(ValueError, match="row_size=32 does not divide 48"):
        encode(x, "mxfp4", hadamard=Hadamard(32))
    with pytest.raises(ValueError, match="column_size=128 does not divide 64"):
        encode_transposed(x, "mxfp4", hadamard=Hadamard(128))
    with pytest.raises(TypeError, match="float32, bfloat16, float16 or float64"):
        parco.encode_both(x.int(), "mxfp4")
    with pytest.raises(ValueError, match="the blocks of format fp8_e4m3:row"):
        cast_both(x, None, None, "fp8_e4m3:row", "nearest", 0)
    with pytest.raises(ValueError, match="transposed_scale is None"):
        cast_both(x, torch.ones(1), None, "nvfp4", "nearest", 0)
    with pytest.raises(ValueError, match="global_scale is"):
        cast_both(x, torch.ones(1), None, "nvfp4", "nearest", 0, straight=False)
    with pytest.raises(ValueError, match="neither straight nor transposed"):
        cast_both(x, None, None, "mxfp4", "nearest", 0, straight=False, transposed=False)
    with pytest.raises(ValueError, match="one size is needed"):
        cast_both(x, None, None, "mxfp4", "nearest", 0, row_size=16, column_size=32)
    with pytest.raises(ValueError, match="a matrix with rows and columns"):
        cast_both(x[:0], None, None, "mxfp4", "nearest", 0)


class TestCastBoth(KernelLaws):
    operation = "cast_both"

    @pytest.fixture(params=["mxfp8_e4m3", "nvfp4"])
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        x = torch.randn(32, 96, generator=torch.Generator().manual_seed(1))
        scales = (factor(request.param), factor(request.param))
        return x, *scales, request.param, "nearest", 7, True, True, 0, 16, 3
