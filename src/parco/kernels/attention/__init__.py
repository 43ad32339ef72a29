"""Attention of many queries at once, whose scores are never whole: `attention`."""

from parco.kernels.attention.operation import attention

__all__ = ["attention"]
