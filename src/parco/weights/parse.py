"""Reads a Weight back from its printed form.

Grammar, with `NxK` the shape and `format` a name that `Format.parse` knows:

    weight = dense(format, NxK) | quantized(format, NxK) | lowrank(weight, weight) | sum(weight, weight, …)
           | scaled(weight, dense(format, 1xK)) | rotated(weight, seed) | shared(weight)
           | semisparse(format, NxK) | bitmap(format, NxK, kept) | blocksparse(format, NxK, block, kept)
"""

from __future__ import annotations

import re
from collections.abc import Callable

from parco.formats import Format
from parco.weights.bitmap import Bitmap
from parco.weights.block_sparse import BlockSparse
from parco.weights.dense import Dense
from parco.weights.low_rank import LowRank
from parco.weights.quantized import Quantized
from parco.weights.rotated import Rotated
from parco.weights.scaled import Scaled
from parco.weights.semi_sparse import SemiSparse
from parco.weights.shared import Shared
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
    reader = _READERS.get(name)
    if reader is None:
        raise ValueError(f"weight {text!r}: {name!r} is unknown; known are {', '.join(_READERS)}")
    return reader(arguments, text)


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


def _dense(arguments: list[str], text: str) -> Weight:
    form, shape = _stored("dense", arguments, text)
    return Dense(shape, form)


def _quantized(arguments: list[str], text: str) -> Weight:
    return Quantized(*_stored("quantized", arguments, text))


def _low_rank(arguments: list[str], text: str) -> Weight:
    if len(arguments) != 2:
        raise ValueError(f"weight {text!r}: lowrank takes 2 weights, left and right, not {len(arguments)}")
    return LowRank(*map(parse, arguments))


def _sum(arguments: list[str], text: str) -> Weight:
    return Sum(*map(parse, arguments))


def _scaled(arguments: list[str], text: str) -> Weight:
    inner, scale = map(parse, arguments) if len(arguments) == 2 else (None, None)
    if inner is None or not isinstance(scale, Dense):
        raise ValueError(f"weight {text!r}: scaled takes a weight and its scale, as in scaled(…, dense(bf16, 1x4096))")
    return Scaled(inner, scale)


def _rotated(arguments: list[str], text: str) -> Weight:
    if len(arguments) != 2 or not arguments[1].strip().isdecimal():
        raise ValueError(f"weight {text!r}: rotated takes a weight and a seed, as in rotated(…, 0)")
    return Rotated(parse(arguments[0]), int(arguments[1]))


def _shared(arguments: list[str], text: str) -> Weight:
    if len(arguments) != 1:
        raise ValueError(f"weight {text!r}: shared takes 1 weight, not {len(arguments)}")
    return Shared(parse(arguments[0]))


def _semi_sparse(arguments: list[str], text: str) -> Weight:
    return SemiSparse(*_stored("semisparse", arguments, text))


def _bitmap(arguments: list[str], text: str) -> Weight:
    (kept,) = _and_numbers("bitmap", arguments, text, ("kept",))
    return Bitmap(*_stored("bitmap", arguments[:2], text), kept)


def _block_sparse(arguments: list[str], text: str) -> Weight:
    block, kept = _and_numbers("blocksparse", arguments, text, ("block", "kept"))
    return BlockSparse(*_stored("blocksparse", arguments[:2], text), block, kept)


def _and_numbers(name: str, arguments: list[str], text: str, wanted: tuple[str, ...]) -> list[int]:
    """The whole numbers `wanted` that follow a format and a shape."""
    numbers = [argument.strip() for argument in arguments[2:]]
    if len(numbers) != len(wanted) or not all(number.isdecimal() for number in numbers):
        following = " and ".join(wanted)
        raise ValueError(f"weight {text!r}: {name} takes a format, a shape and {following}, as whole numbers")
    return [int(number) for number in numbers]


_READERS: dict[str, Callable[[list[str], str], Weight]] = {
    "dense": _dense,
    "quantized": _quantized,
    "lowrank": _low_rank,
    "sum": _sum,
    "scaled": _scaled,
    "rotated": _rotated,
    "shared": _shared,
    "semisparse": _semi_sparse,
    "bitmap": _bitmap,
    "blocksparse": _block_sparse,
}
"""What reads the arguments of each name; a new Weight adds its line here and in the grammar above."""
