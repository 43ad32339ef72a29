"""What a transformer does between its products, each in one pass: `rms_norm`, `layer_norm`, `gated`, `rotate` and
`attend`.
"""

from parco.kernels.activations import ACTIVATIONS
from parco.kernels.rowwise.attention import attend
from parco.kernels.rowwise.gate import gated
from parco.kernels.rowwise.layer_norm import layer_norm
from parco.kernels.rowwise.norm import rms_norm
from parco.kernels.rowwise.rotation import rotate

__all__ = ["ACTIVATIONS", "attend", "gated", "layer_norm", "rms_norm", "rotate"]
