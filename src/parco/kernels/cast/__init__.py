"""Cast: numbers into a format and back. The reference implementations, on any device.

>>> import torch, parco
>>> e = parco.encode(torch.randn(64, 128), "int4:32")
>>> e.nbytes, parco.decode(e).shape
(4608, torch.Size([64, 128]))
"""

from parco.kernels.cast.codec import Encoded, decode, decode_tensors, encode
from parco.kernels.cast.delayed import DelayedScaling
from parco.kernels.cast.packing import pack, unpack
from parco.kernels.cast.philox import philox4x32, random_bits
from parco.kernels.cast.rounding import ROUNDINGS, Rounding, to_power_of_two

__all__ = [
    "ROUNDINGS",
    "DelayedScaling",
    "Encoded",
    "Rounding",
    "decode",
    "decode_tensors",
    "encode",
    "pack",
    "philox4x32",
    "random_bits",
    "to_power_of_two",
    "unpack",
]
