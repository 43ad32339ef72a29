"""Linear operations over stored weights: `linear_coded`, `linear_coded_int8`, `linear_both`, `linear_dense`,
`linear_chain`, `linear_lora` and `embedding_coded`, in the library `torch.ops.parco`; and the panels in which they read
codes fastest.
"""

from parco.kernels.linear.both import linear_both, takes_both
from parco.kernels.linear.chain import linear_chain
from parco.kernels.linear.coded import linear_coded
from parco.kernels.linear.dense import linear_dense
from parco.kernels.linear.embedding import embedding_coded
from parco.kernels.linear.int8 import linear_coded_int8, rounded_to_int8
from parco.kernels.linear.lora import linear_lora
from parco.kernels.linear.panels import is_packed, pack, unpack
from parco.kernels.linear.storage import packs, takes_int8

__all__ = [
    "embedding_coded",
    "is_packed",
    "linear_both",
    "linear_chain",
    "linear_coded",
    "linear_coded_int8",
    "linear_dense",
    "linear_lora",
    "pack",
    "packs",
    "rounded_to_int8",
    "takes_both",
    "takes_int8",
    "unpack",
]
