"""How one matrix is stored: specifications that compose, `Dense`, `Quantized`, `LowRank`, `Sum`, `Scaled`,
`Rotated` and `Shared`, and those with zeros that are not stored, `SemiSparse`, `BlockSparse` and `Bitmap`.
"""

from parco.weights.bitmap import Bitmap
from parco.weights.block_sparse import BlockSparse
from parco.weights.dense import Dense
from parco.weights.low_rank import LowRank
from parco.weights.parse import parse
from parco.weights.quantized import Quantized
from parco.weights.rotated import Rotated
from parco.weights.scaled import Scaled
from parco.weights.semi_sparse import SemiSparse
from parco.weights.shared import Shared, shared_parts, shared_tensors
from parco.weights.sparse import Sparse
from parco.weights.sum import Sum
from parco.weights.weight import Weight

__all__ = [
    "Bitmap",
    "BlockSparse",
    "Dense",
    "LowRank",
    "Quantized",
    "Rotated",
    "Scaled",
    "SemiSparse",
    "Shared",
    "Sparse",
    "Sum",
    "Weight",
    "parse",
    "shared_parts",
    "shared_tensors",
]
