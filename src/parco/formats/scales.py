"""Scales: how the factor of a block is found, and how it is stored."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

ScaleRule = Literal["floor", "ceil", "even", "rceil"]
SCALE_RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)
DTYPE_NAMES: dict[torch.dtype, str] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"scale dtype={dtype}: must be float32, bfloat16 or float16")


@dataclass(frozen=True)
class Unscaled:
    """No scale: a plain saturating cast."""


UNSCALED = Unscaled()


@dataclass(frozen=True)
class ScaleAbsmax:
    """amax(block) / greatest element, rounded to `dtype`; with `power_of_two`, raised to the next one."""

    dtype: torch.dtype = torch.float32
    power_of_two: bool = False

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)


@dataclass(frozen=True)
class ScaleRange:
    """Asymmetric: (max - min) / (codes - 1) with min <= 0 <= max, rounded to `dtype`, and a zero point of one byte."""

    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)


@dataclass(frozen=True)
class ScaleAbsmean:
    """mean |x| of the block, at least 1e-5 (BitNet b1.58), rounded to `dtype`."""

    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)


@dataclass(frozen=True)
class ScaleE8M0:
    """A power of two in one byte (OCP MX 1.0), found by `rule`: floor, ceil, even or rceil.

    `floor` is the OCP rule and saturates a block's top; `rceil`, the default, never does: training with floor was
    reported to diverge where round-up scales match bf16 (arXiv 2506.08027).
    """

    rule: ScaleRule = "rceil"

    def __post_init__(self) -> None:
        if self.rule not in SCALE_RULES:
            raise ValueError(f"rule={self.rule!r}: a scale rule is one of {', '.join(SCALE_RULES)}")


@dataclass(frozen=True)
class ScaleE4M3:
    """NVFP4's two levels: an e4m3 scale per block under one fp32 scale per tensor, amax(tensor) / (448 * 6)."""


@dataclass(frozen=True)
class ScaleDelayed:
    """An fp32 scale that comes from earlier steps' amax (see `parco.kernels.cast.DelayedScaling`): encode must be
    given it.
    """


Scale = Unscaled | ScaleAbsmax | ScaleRange | ScaleAbsmean | ScaleE8M0 | ScaleE4M3 | ScaleDelayed
