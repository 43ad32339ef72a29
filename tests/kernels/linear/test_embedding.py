"""embedding_coded: rows of the decoded matrix, exactly."""

from typing import Any

import pytest
import torch
from tests.kernels.linear.test_coded import BLOCKS, FLOATS, INTEGERS, named, stored
from tests.laws.kernel_laws import KernelLaws

from parco.kernels.cast import decode_tensors
from parco.kernels.linear import embedding_coded


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("format", [*INTEGERS, *BLOCKS])
def test_rows_of_the_decoded_matrix(format: str, dtype: torch.dtype) -> None:
    for columns in (96, 131, 517, 1):
        tensors = stored(format, 30, columns)
        indices = torch.tensor([[0, 29, 7], [7, 7, 1]])
        expected = decode_tensors(format, (30, columns), named(tensors), dtype)[indices]
        assert torch.equal(embedding_coded(indices, *tensors, format, columns, dtype), expected)
        assert torch.equal(embedding_coded(indices.int(), *tensors, format, columns, dtype), expected)
        assert embedding_coded(indices[:0], *tensors, format, columns, dtype).shape == (0, 3, columns)


def test_many_rows_on_several_threads() -> None:
    tensors = stored("int4:32", 300, 1024)
    indices = torch.arange(300).repeat(4)
    for dtype in FLOATS:
        expected = decode_tensors("int4:32", (300, 1024), named(tensors), dtype)[indices]
        assert torch.equal(embedding_coded(indices, *tensors, "int4:32", 1024, dtype), expected)


@pytest.mark.parametrize("index", [-1, 30, 2**40])
def test_a_row_outside_the_matrix_is_named(index: int) -> None:
    tensors = stored("int4:32", 30, 96)
    with pytest.raises(IndexError, match=f"index {index} .* 30 rows"):
        embedding_coded(torch.tensor([0, index]), *tensors, "int4:32", 96, torch.float32)


def test_wrong_arguments_are_named() -> None:
    tensors = stored("int4:32", 30, 96)
    with pytest.raises(TypeError, match="indices are"):
        embedding_coded(torch.zeros(2), *tensors, "int4:32", 96, torch.float32)
    with pytest.raises(TypeError, match="dtype is"):
        embedding_coded(torch.tensor([0]), *tensors, "int4:32", 96, torch.int8)


class TestEmbeddingCoded(KernelLaws):
    operation = "embedding_coded"

    @pytest.fixture(params=[("int4:32", torch.bfloat16), ("nvfp4", torch.float32)], ids=str)
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        format, dtype = request.param
        return torch.tensor([[3, 0], [20, 3]]), *stored(format, 21, 96), format, 96, dtype, 0
