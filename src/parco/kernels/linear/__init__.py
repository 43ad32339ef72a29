"""Linear operations over stored weights: `linear_int`, `linear_dense` and `embedding_int`, in the library
`torch.ops.parco`.
"""

from parco.kernels.linear.dense import linear_dense
from parco.kernels.linear.embedding import embedding_int
from parco.kernels.linear.integer import linear_int

__all__ = ["embedding_int", "linear_dense", "linear_int"]
