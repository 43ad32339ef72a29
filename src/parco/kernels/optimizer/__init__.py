"""What an optimizer does to a model's parameters: `adamw`, and the 8-bit `states` that it may keep."""

from parco.kernels.optimizer.adamw import ROUNDINGS, adamw, scale_shape, shape_in_rows
from parco.kernels.optimizer.states import BLOCK, decode_moment, encode_moment

__all__ = ["BLOCK", "ROUNDINGS", "adamw", "decode_moment", "encode_moment", "scale_shape", "shape_in_rows"]
