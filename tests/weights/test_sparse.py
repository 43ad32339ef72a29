"""What sparse Weights promise besides the laws: which numbers they keep, and that what is left out is exactly zero."""

import pytest
import torch
from tests.laws.weight_laws import inputs

from parco import weights
from parco.nn import Linear, StoredWeight
from parco.weights import Bitmap, BlockSparse, Dense, Quantized, SemiSparse

SHAPES = [(33, 50), (1, 17), (70, 130), (64, 64)]
MAKERS = {
    "semisparse": lambda form, shape: SemiSparse(form, shape),
    "bitmap": lambda form, shape: Bitmap(form, shape, -(-shape[1] // 3)),
    "blocksparse 16": lambda form, shape: BlockSparse(form, shape, 16, max(1, shape[1] // 32)),
    "blocksparse 64": lambda form, shape: BlockSparse(form, shape, 64, 1),
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", ["fp32", "bf16", "int8:row", "int4:32:asym", "mxfp4"])
def test_what_is_left_out_is_exactly_zero_and_the_rest_as_the_format_has_it(make, form, shape):
    spec, matrix = make(form, shape), inputs(*shape)
    keep = spec.keep(matrix.abs())
    tensors = spec.encode(torch.where(keep, matrix, 0))
    dense = spec.dense(*tensors)
    assert (dense[~keep] == 0).all()
    # The kept numbers of a row are a row of a dense matrix: the same codes, the same numbers.
    kept = spec.tensors()["values" if spec.format.is_dense else "codes"]
    assert tensors[0].dtype == kept.dtype
    if spec.format.is_dense:
        assert torch.equal(dense[keep], matrix[keep].to(kept.dtype).float())
    elif not isinstance(spec, BlockSparse):
        stored = Quantized(spec.format, (shape[0], int(keep[0].sum())))
        assert torch.equal(dense[keep], stored.dense(*stored.encode(matrix[keep].reshape(stored.shape))).flatten())
    else:
        assert (dense - matrix * keep).abs().max() < 0.5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fewer_non_zeros_are_stored_as_well(make, shape):
    spec, matrix = make("fp32", shape), inputs(*shape)
    matrix *= spec.keep(matrix.abs()) & (inputs(*shape, seed=8) > 0)
    assert torch.equal(spec.dense(*spec.encode(matrix)), matrix)
    assert torch.equal(spec.dense(*spec.encode(0 * matrix)), 0 * matrix)


def test_keep_takes_the_largest_scores_and_the_first_of_equal_ones():
    scores = torch.tensor([[1.0, 3, 2, 4, 0, 0, 0, 0, 9, 8, 7]])
    assert SemiSparse("fp32", (1, 11)).keep(scores).int().tolist() == [[0, 1, 0, 1, 1, 1, 0, 0, 1, 1, 0]]
    assert Bitmap("fp32", (1, 11), 3).keep(scores).int().tolist() == [[0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1]]
    assert Bitmap("fp32", (1, 11), 8).keep(scores).int().tolist() == [[1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1]]
    scores = torch.zeros(20, 40)
    scores[3, 20], scores[18, 39] = 1.0, 1.0
    keep = BlockSparse("fp32", (20, 40), 16, 1).keep(scores)
    assert keep[:16, 16:32].all()
    assert keep[16:, 32:].all()
    assert keep.sum() == 16 * 16 + 4 * 8


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (SemiSparse("fp32", (4, 10)), r"columns 4 to 7 of row 2 have 3 non-zeros and 2:4 keeps 2; 1 of the matrix's 3"),
        (Bitmap("fp32", (4, 10), 2), r"row 2 has 3 non-zeros and this Weight keeps 2 of each row; 1 of the matrix's 3"),
        (BlockSparse("fp32", (4, 10), 16, 1), None),
        (SemiSparse("fp32", (4, 9)), r"\(4, 10\)"),
    ],
    ids=str,
)
def test_more_non_zeros_than_fit_are_refused_and_counted(spec, said):
    matrix = torch.zeros(4, 10)
    matrix[2, 5:8] = 1.0
    if said is None:
        assert torch.equal(spec.dense(*spec.encode(matrix)), matrix)
        return
    with pytest.raises(ValueError, match=said):
        spec.encode(matrix)


def test_a_band_with_too_many_blocks_is_named():
    matrix = torch.zeros(40, 70)
    matrix[35, ::16] = 1.0
    with pytest.raises(
        ValueError, match="rows 32 to 39 have 5 blocks with non-zeros and this Weight keeps 2 of each band"
    ):
        BlockSparse("bf16", (40, 70), 16, 2).encode(matrix)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("semisparse(bf16)", "a format and a shape"),
        ("bitmap(int8:row, 4x8)", "takes a format, a shape and kept"),
        ("bitmap(int8:row, 4x8, 9)", "kept is 9"),
        ("bitmap(int8:row, 4x8, many)", "takes a format, a shape and kept"),
        ("blocksparse(bf16, 64x64, 32)", "a shape and block and kept"),
        ("blocksparse(bf16, 64x64, 8, 1)", "block is 8"),
        ("blocksparse(bf16, 64x64, 32, 0)", "kept is 0"),
        ("blocksparse(int99:32, 64x64, 32, 1)", "int99"),
    ],
)
def test_texts_that_are_no_sparse_weights(text, said):
    with pytest.raises(ValueError, match=said):
        weights.parse(text)


def test_bytes():
    # Half the numbers, a scale for each row, and a bit for each number; blocks of 32 need two bytes each.
    assert SemiSparse("int8:row", (1024, 4096)).nbytes == 1024 * (2048 + 4 + 512)
    assert Bitmap("int8:row", (1024, 4096), 2048).nbytes == 1024 * (2048 + 4 + 512)
    assert BlockSparse("bf16", (1024, 4096), 32, 64).nbytes == 1024 * 4096 + 32 * 64 * 2
    assert BlockSparse("bf16", (16, 16 * 40000), 16, 1).tensors()["blocks"].dtype == torch.int32


def test_a_layer_holds_one_and_gradients_reach_what_is_before_it():
    spec = Bitmap("int8:row", (24, 40), 20)
    matrix = inputs(24, 40)
    layer = Linear(StoredWeight.encode(spec, matrix * spec.keep(matrix.abs())).pack_())
    x = inputs(3, 40).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.dense().sum(0).expand(3, 40))
    assert not any(parameter.requires_grad for parameter in layer.weight.parameters())
    dense = Dense((24, 40))
    torch.testing.assert_close(layer(x), dense.apply(x, layer.weight.dense()), atol=1e-2, rtol=0)
