"""The noun Product: how one product of matrices is computed. Small values that can be printed and typed back."""

import re
from dataclasses import dataclass

WORDS = 3
"""bf16 words that an fp32 number splits into exactly: 3 x 8 bits of significand."""


@dataclass(frozen=True)
class Native:
    """What torch computes for these dtypes on this device. Text: `native`."""

    def __str__(self) -> str:
        return "native"


@dataclass(frozen=True)
class Split:
    """Products of bf16 words, accumulated in fp32: x = h + m + l, of which words i and j are multiplied where i + j <
    order.

    `Split(2)` takes 3 products (about 2**-16 of relative error), `Split(3)` 6 (fp32 grade), `Split(4)` 8 and
    `Split(5)` all 9. For machines whose bf16 multiplier is several times as fast as fp32's. Text: `split(3)`.
    ValueError for an order outside 2 to 5.
    """

    order: int = 3

    def __post_init__(self) -> None:
        if not 2 <= self.order <= 2 * WORDS - 1:
            raise ValueError(f"Split({self.order}): the order is 2 (3 products), 3 (6), 4 (8) or 5 (9)")

    def __str__(self) -> str:
        return f"split({self.order})"

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The pairs of words that are multiplied, smallest products first, which is the order they are added in."""
        kept = [(i, j) for i in range(WORDS) for j in range(WORDS) if i + j < self.order]
        return tuple(sorted(kept, key=lambda pair: (-sum(pair), pair)))


@dataclass(frozen=True)
class Activations:
    """The left operand is rounded to int8 first, with one scale for each of its rows, absmax / 127: quantization per
    token. A stored matrix of small integers then takes half the instructions, or a quarter where x is fp32.

    Text: `activations(int8)`. ValueError for another format.
    """

    format: str = "int8"

    def __post_init__(self) -> None:
        if self.format != "int8":
            raise ValueError(f"Activations({self.format!r}): activations are rounded to int8 or not at all")

    def __str__(self) -> str:
        return f"activations({self.format})"


Product = Native | Split | Activations

NATIVE = Native()


def parse(text: str | Product) -> Product:
    """The Product that `text` names: `native`, `split(N)` or `activations(int8)`; a Product is returned as it is.
    ValueError otherwise.
    """
    if isinstance(text, Product):
        return text
    if text.strip() == "native":
        return NATIVE
    match = re.fullmatch(r"(split|activations)\((\w+)\)", text.strip())
    if match is None or (match[1] == "split" and not match[2].isdecimal()):
        raise ValueError(
            f"unknown product {text!r}: known are native, split(2), split(3), split(4), split(5), activations(int8)"
        )
    return Split(int(match[2])) if match[1] == "split" else Activations(match[2])
