"""Reads a Weight back from its printed form.

Grammar, with `NxK` the shape and `format` a name that `Format.parse` knows:

    weight = dense(format, NxK) | quantized(format, NxK) | lowrank(weight, weight) | sum(weight, weight, …)
"""

from __future__ import annotations

import re

from parco.formats import Format
from parco.weights.dense import Dense
from parco.weights.low_rank import LowRank
from parco.weights.quantized import Quantized
from parco.weights.sum import Sum
from parco.weights.weight import Weight

_CALL = re.compile(r"\s*([a-z]+)\s*\((.*)\)\s*", re.DOTALL)
_SHAPE = re.compile(r"\s*(\d+)\s*x\s*(\d+)\s*")


def parse(text: str) -> Weight:
    """The Weight that prints as `text`: `parse(str(w)) == w`. Raises ValueError naming the part that cannot be read."""
    call = _CALL.fullmatch(text)
    if call is None:
        raise ValueError(
            f"weight {text!r} is not of the form name(arguments); for example quantized(int4:32, 1024x4096)"
        )
    name, arguments = call[1], _arguments(call[2], text)
    if name == "dense":
        form, shape = _stored(name, arguments, text)
        return Dense(shape, form)
    if name == "quantized":
        form, shape = _stored(name, arguments, text)
        return Quantized(form, shape)
    if name == "lowrank":
        if len(arguments) != 2:
            raise ValueError(f"weight {text!r}: lowrank takes 2 weights, left and right, not {len(arguments)}")
        return LowRank(parse(arguments[0]), parse(arguments[1]))
    if name == "sum":
        return Sum(*(parse(argument) for argument in arguments))
    raise ValueError(f"weight {text!r}: {name!r} is unknown; known are dense, quantized, lowrank, sum")


def _arguments(inner: str, text: str) -> list[str]:
    """Splits at the commas that no parenthesis encloses."""
    found: list[str] = []
    depth = start = 0
    for position, character in enumerate(inner):
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
        if character == "," and depth == 0:
            found.append(inner[start:position])
            start = position + 1
    if depth != 0:
        raise ValueError(f"weight {text!r}: its parentheses do not match")
    return [*found, inner[start:]]


def _stored(name: str, arguments: list[str], text: str) -> tuple[Format, tuple[int, int]]:
    shape = _SHAPE.fullmatch(arguments[1]) if len(arguments) == 2 else None
    if shape is None:
        raise ValueError(
            f"weight {text!r}: {name} takes a format and a shape, as in {name}({arguments[0].strip()}, 1024x4096)"
        )
    return Format.parse(arguments[0].strip()), (int(shape[1]), int(shape[2]))
