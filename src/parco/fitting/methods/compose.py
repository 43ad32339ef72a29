"""Which methods compose, and to what: `store` is `first >> then`, `add` is `first + other`."""

from __future__ import annotations

from parco.fitting.methods.correct import Corrected
from parco.fitting.methods.factor import Factor, QuantizedFactors
from parco.fitting.methods.joint import Joint
from parco.fitting.methods.method import Method
from parco.fitting.methods.prune import Prune, QuantizedPrune
from parco.fitting.methods.quantize import Keep, Quantize
from parco.fitting.methods.transform import Transform, Transformed


def store(first: Method, then: Method) -> Method:
    """What `first` makes, its numbers stored by `then`. Raises TypeError where that has no meaning."""
    match first, then:
        case Transform(), _ if then.together:
            raise TypeError(
                f"{first} >> {then}: each matrix gets its own coordinates, in which a group has no factor in common; "
                f"{first}>>{then.alone()} factors each by itself"
            )
        case Transform(), _ if not isinstance(then, Keep) and not _begins_alike(first, then):
            return Transformed(first, then)
        case Transformed(), _:
            return Transformed(first.transform, store(first.then, then))
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
                f"{first} >> {then}: only a matrix in other coordinates, low-rank factors and the kept numbers of a "
                "pruned matrix are stored by a further method, as in scale>>int4:64, factor(0.5)>>int4:32 and "
                "prune(2:4)>>int8:row"
            )


def _begins_alike(first: Transform, then: Method) -> bool:
    """Whether `then` would at once change the coordinates once more in the same way."""
    return type(then.transform if isinstance(then, Transformed) else then) is type(first)


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
