"""Whether a matrix is still what it was, at the cost of reading it once."""

import torch
from torch import Tensor

from parco import _C


def fingerprint(x: Tensor) -> int | None:
    """A hash of 64 bits of the bytes of `x` [M, K], a matrix on the CPU by rows or by columns; None for one that lies
    otherwise. It is no proof, but two matrices that nobody made to collide are expected to share it once in 2⁶⁴.
    """
    if not x.is_cpu or not (x.is_contiguous() or x.T.is_contiguous()):
        return None
    return _C.fingerprint(x.data_ptr(), x.nbytes, torch.get_num_threads())
