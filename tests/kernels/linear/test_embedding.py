"""embedding_int: rows of the dequantized table, exactly."""

from typing import Any

import pytest
import torch
from tests.kernels.linear.test_integer import FLOATS, stored
from tests.laws.kernel_laws import KernelLaws

from parco.kernels.linear import embedding_int, reference


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("columns", "group"), [(96, 32), (131, 131), (517, 160), (1, 1)])
def test_rows_of_the_dequantized_table(bits: int, columns: int, group: int, dtype: torch.dtype) -> None:
    tensors = stored(30, columns, bits, group, asymmetric=columns % 2 == 1, dtype=torch.float32)
    indices = torch.tensor([[0, 29, 7], [7, 7, 1]])
    expected = reference.dequantize(*tensors, bits, group, columns, dtype)[indices]
    assert torch.equal(embedding_int(indices, *tensors, bits, group, columns, dtype), expected)
    assert torch.equal(embedding_int(indices.int(), *tensors, bits, group, columns, dtype), expected)
    assert embedding_int(indices[:0], *tensors, bits, group, columns, dtype).shape == (0, 3, columns)


def test_many_rows_on_several_threads() -> None:
    tensors = stored(300, 1024, 4, 32)
    indices = torch.arange(300).repeat(4)
    expected = reference.dequantize(*tensors, 4, 32, 1024, torch.bfloat16)[indices]
    assert torch.equal(embedding_int(indices, *tensors, 4, 32, 1024, torch.bfloat16), expected)


@pytest.mark.parametrize("index", [-1, 30, 2**40])
def test_a_row_outside_the_table_is_named(index: int) -> None:
    tensors = stored(30, 96, 4, 32)
    with pytest.raises(IndexError, match=f"index {index} .* 30 rows"):
        embedding_int(torch.tensor([0, index]), *tensors, 4, 32, 96, torch.float32)


def test_wrong_arguments_are_named() -> None:
    tensors = stored(30, 96, 4, 32)
    with pytest.raises(TypeError, match="indices are"):
        embedding_int(torch.zeros(2), *tensors, 4, 32, 96, torch.float32)
    with pytest.raises(TypeError, match="dtype is"):
        embedding_int(torch.tensor([0]), *tensors, 4, 32, 96, torch.int8)


class TestEmbeddingInt(KernelLaws):
    operation = "embedding_int"

    @pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        return torch.tensor([[3, 0], [20, 3]]), *stored(21, 96, 4, 32), 4, 32, 96, request.param
