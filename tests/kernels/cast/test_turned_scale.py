"""NVFP4's global scale of a transposed and transformed matrix, found without turning the matrix."""

import math

import pytest
import torch

from parco.formats import parse
from parco.kernels.cast import Hadamard
from parco.kernels.cast.hadamard import SIZES, turned_amax
from parco.kernels.cast.scaling import own_global_scale, turned_global_scale


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_the_scale_is_that_of_the_transformed_transpose(size: int, dtype: torch.dtype, bad: float | None) -> None:
    hadamard, nvfp4 = Hadamard(size, 12345), parse("nvfp4")
    for rows, columns in ((size, 1), (3 * size, 37), (640, 700)):
        torch.manual_seed(rows)
        x = (torch.randn(rows, columns) * torch.exp(torch.randn(rows, 1))).to(dtype)
        if bad is not None:
            x[rows - 2, columns // 2] = bad
        assert torch.equal(turned_global_scale(x, nvfp4, hadamard), own_global_scale(hadamard(x.T), nvfp4))


def test_groups_are_those_of_the_transpose() -> None:
    x = torch.randn(64, 5)
    found = turned_amax(x, 32, 7, 16)
    assert torch.equal(found.T, Hadamard(32, 7)(x.T).abs().unflatten(1, (-1, 16)).amax(2))
