"""Cast: numbers into a format and back, by rows, transposed or both, after a Hadamard transform or not.

>>> import torch, parco
>>> e = parco.encode(torch.randn(64, 128), "int4:32")
>>> e.nbytes, parco.decode(e).shape
(4608, torch.Size([64, 128]))
"""

from parco.kernels.cast.codec import Encoded, decode, decode_tensors, encode
from parco.kernels.cast.delayed import DelayedScaling
from parco.kernels.cast.hadamard import Hadamard, turned, turned_back
from parco.kernels.cast.packing import of_bits, pack, read_codes, to_bits, unpack, write_codes
from parco.kernels.cast.philox import philox4x32, random_bits
from parco.kernels.cast.rounding import ROUNDINGS, Rounding, to_power_of_two
from parco.kernels.cast.transposed import encode_both, encode_transposed

__all__ = [
    "ROUNDINGS",
    "DelayedScaling",
    "Encoded",
    "Hadamard",
    "Rounding",
    "decode",
    "decode_tensors",
    "encode",
    "encode_both",
    "encode_transposed",
    "of_bits",
    "pack",
    "philox4x32",
    "random_bits",
    "read_codes",
    "to_bits",
    "to_power_of_two",
    "turned",
    "turned_back",
    "unpack",
    "write_codes",
]
