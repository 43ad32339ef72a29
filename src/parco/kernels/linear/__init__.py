"""Linear operations over stored weights: `linear_coded`, `linear_dense` and `embedding_coded`, in the library
`torch.ops.parco`.
"""

from parco.kernels.linear.coded import linear_coded
from parco.kernels.linear.dense import linear_dense
from parco.kernels.linear.embedding import embedding_coded

__all__ = ["embedding_coded", "linear_coded", "linear_dense"]
