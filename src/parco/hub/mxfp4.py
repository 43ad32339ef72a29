"""gpt-oss as OpenAI published it: experts in MXFP4, everything else in bf16.

| tensor | holds |
| --- | --- |
| gate_up_proj_blocks, uint8 | [E, 2I, H/32, 16]: two e2m1 numbers a byte, the first in the low half |
| gate_up_proj_scales, uint8 | [E, 2I, H/32], a power of two each (e8m0) |
| gate_up_proj_bias | [E, 2I]; rows of gate and up alternate in all three |
| down_proj_blocks, down_proj_scales, down_proj_bias | the same of [H, I] |

These are the codes and scales of `mxfp4`. Source: Transformers' `integrations/mxfp4.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from parco.hub.foreign import Matrix, shaped
from parco.nn import Site
from parco.nn.experts import gate_before_up
from parco.weights import Quantized

_BLOCK = 32


class Mxfp4:
    """The layout of gpt-oss's files. Raises nothing: there is nothing to choose in their `quantization_config`."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        pass

    @property
    def parts(self) -> frozenset[str]:
        return frozenset(("blocks", "scales"))

    def matrix(self, name: str, where: Site, parts: Mapping[str, Tensor]) -> Matrix:
        rows, columns = where.shape
        if columns % _BLOCK:
            raise ValueError(f"blocks: {columns} columns are no whole number of blocks of {_BLOCK}")
        blocks = shaped(parts, "blocks", (rows, columns // _BLOCK, _BLOCK // 2), torch.uint8).flatten(1)
        scales = shaped(parts, "scales", (rows, columns // _BLOCK), torch.uint8)
        if where.kind == "expert":
            blocks, scales = (gate_before_up(where.module, where.expert[0], each, 0) for each in (blocks, scales))
        return Matrix(Quantized("mxfp4", where.shape), (blocks.contiguous(), scales.contiguous()))

    def notes(self) -> tuple[str, ...]:
        return ()
