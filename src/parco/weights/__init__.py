"""How one matrix is stored: specifications that compose, `Dense`, `Quantized`, `LowRank` and `Sum`."""

from parco.weights.dense import Dense
from parco.weights.low_rank import LowRank
from parco.weights.parse import parse
from parco.weights.quantized import Quantized
from parco.weights.sum import Sum
from parco.weights.weight import Weight

__all__ = ["Dense", "LowRank", "Quantized", "Sum", "Weight", "parse"]
