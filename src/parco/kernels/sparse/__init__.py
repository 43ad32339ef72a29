"""Products with sparse matrices, `linear_masked` and `linear_blocks`, in the library `torch.ops.parco`; and where
their kept numbers stand.
"""

from parco.kernels.sparse.blocks import linear_blocks
from parco.kernels.sparse.kept import index_dtype, mask_bytes, of_bands, pack_mask, spread_blocks, spread_masked
from parco.kernels.sparse.masked import linear_masked

__all__ = [
    "index_dtype",
    "linear_blocks",
    "linear_masked",
    "mask_bytes",
    "of_bands",
    "pack_mask",
    "spread_blocks",
    "spread_masked",
]
