"""linear_masked and linear_blocks: every kernel against the reference, rows alone or together, bad masks and blocks."""

from typing import Any

import pytest
import torch
from tests.laws.kernel_laws import KernelLaws
from tests.laws.weight_laws import inputs
from torch import Tensor

from parco import weights
from parco.kernels.sparse import linear_blocks, linear_masked
from parco.weights import BlockSparse
from parco.weights.sparse import Sparse

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def arguments(text: str, rows: int, dtype: torch.dtype, bias: bool = True) -> tuple[Any, ...]:
    """A call of the operation of the Weight that `text` names."""
    spec = weights.parse(text)
    assert isinstance(spec, Sparse)
    matrix = inputs(*spec.shape, seed=3)
    tensors = spec.encode(matrix * spec.keep(matrix.abs()))
    last = spec.block if isinstance(spec, BlockSparse) else spec._kept.shape[1]
    added = inputs(spec.shape[0], seed=4) if bias else None
    return (inputs(rows, spec.shape[1], dtype=dtype), *spec._arguments(tensors), added, spec._name, spec.shape[1], last)


MASKED = [
    ("bitmap(bf16, 37x100, 41)", 1, torch.bfloat16, False),
    ("bitmap(fp32, 8x64, 64)", 3, torch.float16, True),
    ("bitmap(fp16, 5x1, 1)", 2, torch.float32, True),
    ("bitmap(int8:row, 37x300, 150)", 1, torch.float32, True),
    ("bitmap(int8:row, 20x257, 200)", 40, torch.bfloat16, True),
    ("bitmap(int4:32, 19x130, 70)", 4, torch.bfloat16, True),
    ("bitmap(int8:tensor, 19x130, 70)", 4, torch.bfloat16, True),
    ("semisparse(int8:row, 37x131)", 2, torch.float32, True),
    ("semisparse(bf16, 36x128)", 20, torch.float32, False),
]
BLOCKS = [
    ("blocksparse(bf16, 37x100, 16, 3)", 1, torch.bfloat16, False),
    ("blocksparse(fp32, 64x256, 32, 4)", 7, torch.float16, True),
    ("blocksparse(int8:row, 130x129, 64, 2)", 3, torch.bfloat16, True),
    ("blocksparse(bf16, 100x300, 32, 5)", 40, torch.bfloat16, True),
]


class SparseLaws(KernelLaws):
    def assert_agrees(self, found: Tensor, expected: Tensor, call: tuple[Any, ...], name: str) -> None:
        """As a Weight's tolerance: numbers are of order one and sums of order sqrt(K)."""
        unit = torch.finfo(call[0].dtype).eps
        torch.testing.assert_close(
            found,
            expected,
            rtol=2 * unit,
            atol=4 * max(unit, 2.0**-15) * call[0].shape[-1] ** 0.5,
            msg=lambda text: f"{name}: {text}",
        )


class TestMasked(SparseLaws):
    operation = "linear_masked"

    @pytest.fixture(params=MASKED, ids=lambda case: f"{case[0]}x{case[1]}")
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        return arguments(*request.param)


class TestBlocks(SparseLaws):
    operation = "linear_blocks"

    @pytest.fixture(params=BLOCKS, ids=lambda case: f"{case[0]}x{case[1]}")
    def call(self, request: pytest.FixtureRequest) -> tuple[Any, ...]:
        return arguments(*request.param)


@pytest.mark.parametrize(
    ("operation", "text", "index", "wrong", "said"),
    [
        (linear_masked, "bitmap(bf16, 8x20, 5)", 0, torch.zeros(2, 19), "columns=20"),
        (linear_masked, "bitmap(bf16, 8x20, 5)", 0, torch.zeros(2, 20).int(), "x is torch.int32"),
        (linear_masked, "bitmap(bf16, 8x20, 5)", 1, torch.zeros(8, 6).bfloat16(), "values"),
        (linear_masked, "bitmap(bf16, 8x20, 5)", 5, torch.zeros(8, 2).byte(), r"mask has the shape \(8, 2\)"),
        (linear_masked, "bitmap(bf16, 8x20, 5)", 5, torch.zeros(8, 3), "mask is torch.float32"),
        (linear_masked, "bitmap(bf16, 8x20, 5)", 6, torch.zeros(7), r"bias has the shape \(7,\)"),
        (linear_masked, "bitmap(int8:row, 8x20, 5)", 2, None, "scale"),
        (linear_blocks, "blocksparse(bf16, 8x20, 16, 1)", 9, 8, "block=8"),
        (linear_blocks, "blocksparse(bf16, 8x20, 16, 1)", 5, torch.zeros(1, 3, dtype=torch.int16), "at most 2 blocks"),
        (linear_blocks, "blocksparse(bf16, 8x20, 16, 1)", 5, torch.zeros(1, 1).int(), "blocks is torch.int32"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(operation: Any, text: str, index: int, wrong: Any, said: str) -> None:
    call = list(arguments(text, 2, torch.float32))
    call[index] = wrong
    with pytest.raises((ValueError, TypeError), match=said):
        operation(*call)


@pytest.mark.parametrize(
    "text", ["bitmap(int8:row, 300x700, 350)", "bitmap(bf16, 300x700, 350)", "blocksparse(bf16, 300x700, 32, 11)"]
)
@pytest.mark.parametrize("rows", [8, 30])
def test_neither_threads_nor_other_rows_change_the_bits(text: str, rows: int) -> None:
    x, *rest = arguments(text, rows, torch.bfloat16)
    operation = linear_blocks if text.startswith("blocks") else linear_masked
    whole = operation(x, *rest)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(operation(x, *rest), whole)
    finally:
        torch.set_num_threads(threads)
    few = 3 if rows <= 8 else 21
    assert torch.equal(operation(x[:few], *rest), whole[:few])


@pytest.mark.parametrize("rows", [1, 30])
@pytest.mark.parametrize("given", [[0, 4], [2, 2], [3, 1]])
def test_a_block_that_the_matrix_has_not_or_that_does_not_ascend_is_named(given: list[int], rows: int) -> None:
    call = list(arguments("blocksparse(bf16, 40x64, 16, 2)", rows, torch.float32))
    call[5] = call[5].clone()
    call[5][2] = torch.tensor(given)
    with pytest.raises(IndexError, match=rf"blocks\[2, 1\] is {given[1]}; each row must ascend within 0 to 3"):
        linear_blocks(*call)
