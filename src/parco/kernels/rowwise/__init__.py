"""What a transformer does between its products, each in one pass: `rms_norm`, `layer_norm`, `gated`, `dropout`,
`rotate`, `attend` and `cross_entropy_`.
"""

from parco.kernels.activations import ACTIVATIONS
from parco.kernels.rowwise.attention import attend
from parco.kernels.rowwise.cross_entropy import cross_entropy_
from parco.kernels.rowwise.dropout import dropout
from parco.kernels.rowwise.gate import gated
from parco.kernels.rowwise.layer_norm import layer_norm
from parco.kernels.rowwise.norm import rms_norm
from parco.kernels.rowwise.rotation import rotate

__all__ = ["ACTIVATIONS", "attend", "cross_entropy_", "dropout", "gated", "layer_norm", "rms_norm", "rotate"]
