"""Which methods compose, and to what: `store` is `first >> then`, `add` is `first + other`."""

from __future__ import annotations

from parco.fitting.methods.correct import Corrected
from parco.fitting.methods.factor import Factor, QuantizedFactors
from parco.fitting.methods.joint import Joint
from parco.fitting.methods.method import Method
from parco.fitting.methods.prune import Prune, QuantizedPrune
from parco.fitting.methods.quantize import Quantize


def store(first: Method, then: Method) -> Method:
    """What `first` makes, its numbers stored by `then`. Raises TypeError where that has no meaning."""
    match first, then:
        case Factor(), Quantize():
            return QuantizedFactors(first, then)
        case Joint(factors=Factor() as factors), Quantize():
            return Joint(QuantizedFactors(factors, then))
        case Prune(), Quantize():
            return QuantizedPrune(first, then)
        case Prune(), Corrected(base=Quantize() as base):
            return Corrected(QuantizedPrune(first, base), then.correction)
        case Corrected(correction=Factor() as correction), Quantize():
            return Corrected(first.base, QuantizedFactors(correction, then))
        case _:
            raise TypeError(
                f"{first} >> {then}: only low-rank factors and the kept numbers of a pruned matrix are stored by a "
                "further method, as in factor(0.5)>>int4:32 and prune(2:4)>>int8:row"
            )


def add(first: Method, other: Method) -> Method:
    """`first` and what `other` makes of the matrix that it leaves over. Raises TypeError where that has no meaning."""
    match first, other:
        case Quantize() | Prune() | QuantizedPrune(), Factor() | QuantizedFactors():
            return Corrected(first, other)
        case _:
            raise TypeError(
                f"{first} + {other}: a correction is low-rank and follows a quantization or a pruning, as in "
                "int4:32+factor(rank=16)"
            )
