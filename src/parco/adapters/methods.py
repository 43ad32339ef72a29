"""What is added to a layer: the methods of fine-tuning in few parameters, as values.

Each is frozen, prints as a person would type it and is read back by `parse`: `lora(16)`,
`dora(8, alpha=16, scaling=rslora)`, `vera(256)`, `bottleneck(64, placement=parallel)`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from dataclasses import dataclass
from typing import Any, Literal, final

from parco.kernels.activations import ACTIVATIONS

Scaling = Literal["lora", "rslora"]
Init = Literal["default", "pissa", "loftq", "eva"]
Placement = Literal["serial", "parallel"]


@dataclass(frozen=True)
class Method:
    """What every method has. Fields that have their default are not printed, but for the first."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else None
            if choices is not None and value not in choices:
                raise ValueError(f"{self._name()}: {field.name}={value!r}; one of {', '.join(choices)} is needed")
        first = dataclasses.fields(self)[0].name
        if not isinstance(getattr(self, first), int) or getattr(self, first) < 1:
            raise ValueError(f"{self._name()}: {first}={getattr(self, first)!r}; a whole number from 1 up is needed")
        dropout = getattr(self, "dropout", 0.0)
        if not 0 <= dropout < 1:
            raise ValueError(f"{self._name()}: dropout={dropout!r}; a number in [0, 1) is needed")

    @classmethod
    def _name(cls) -> str:
        return cls.__name__.lower()

    def __str__(self) -> str:
        first, *others = dataclasses.fields(self)
        changed = [field.name for field in others if getattr(self, field.name) != field.default]
        written = [str(getattr(self, first.name)), *(f"{name}={getattr(self, name)}" for name in changed)]
        return f"{self._name()}({', '.join(written)})"


@dataclass(frozen=True)
class Factors(Method):
    """W + s·B·A with B [N, rank] and A [rank, K]: what LoRA and DoRA have in common.

    s is alpha/rank, or alpha/√rank where `scaling` is "rslora" (arXiv 2312.03732); without an `alpha` it is the rank.
    `dropout` is applied to what A multiplies. How A and B begin: `default` draws A as PyTorch draws a linear layer's
    matrix and sets B to 0; `pissa` (arXiv 2404.02948) takes the leading singular vectors of W, and W loses them;
    `loftq` (arXiv 2310.08659) takes over the low-rank correction of a weight stored in few bits; `eva`
    (arXiv 2410.07170) has A span the leading directions of the layer's inputs, and B 0.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    scaling: Scaling = "lora"
    init: Init = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"{self._name()}: alpha={self.alpha!r}; a positive number, or None (the rank) is needed")
        if self.alpha is not None:
            alpha = int(self.alpha) if float(self.alpha).is_integer() else self.alpha
            object.__setattr__(self, "alpha", None if alpha == self.rank else alpha)

    @property
    def scale(self) -> float:
        """What B·A is multiplied by."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)


@final
@dataclass(frozen=True)
class LoRA(Factors):
    """Low-rank adaptation (Hu et al., arXiv 2106.09685): y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ."""


@final
@dataclass(frozen=True)
class DoRA(Factors):
    """Weight-decomposed adaptation (Liu et al., arXiv 2402.09353): each row of W + s·B·A has a trained norm, the
    `magnitude`, which begins as the norm of W's row. The norm it is divided by is a constant to the gradient, as in
    the paper's section 4.3.
    """


@final
@dataclass(frozen=True)
class VeRA(Method):
    """Vector-based adaptation (Kopiczko et al., arXiv 2310.11454): y = x·Wᵀ + b ⊙ ((d ⊙ (x·Aᵀ))·Bᵀ), with one random A
    and B, frozen, for all layers, drawn from `seed`; each layer uses their first columns and rows. b begins as 0 and d
    as `initial`.
    """

    rank: int = 256
    dropout: float = 0.0
    initial: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.initial):
            raise ValueError(f"vera: initial={self.initial!r}; a finite number is needed")
        if not isinstance(self.seed, int) or not -(2**63) <= self.seed < 2**64:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"vera: seed={self.seed!r}; a whole number of 64 bits, as PyTorch takes it, is needed")


@final
@dataclass(frozen=True)
class Bottleneck(Method):
    """A narrow network beside a layer: f(z) = s·(U·φ(D·z + d) + u), D [width, ·], `activation` φ, `factor` s.

    `serial` (Houlsby et al., arXiv 1902.00751) adds f(y) to the layer's output y; `parallel` (He et al.,
    arXiv 2110.04366) adds f(x) of its input. U and u begin as 0, so nothing changes at first.
    """

    width: int = 64
    placement: Placement = "serial"
    activation: str = "relu"
    factor: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"bottleneck: activation={self.activation!r}; one of {', '.join(ACTIVATIONS)} is needed")
        if not math.isfinite(self.factor):
            raise ValueError(f"bottleneck: factor={self.factor!r}; a finite number is needed")


KNOWN: dict[str, type[Method]] = {"lora": LoRA, "dora": DoRA, "vera": VeRA, "bottleneck": Bottleneck}
"""The methods by the name with which their text begins."""

_CALL = re.compile(r"\s*([a-z]+)\s*(?:\((.*)\))?\s*", re.DOTALL)


def parse(text: str | Method) -> Method:
    """The method that prints as `text`: `parse(str(m)) == m`; the bare name stands for its defaults. Raises ValueError
    naming the part that cannot be read.
    """
    if isinstance(text, Method):
        return text
    call = _CALL.fullmatch(text)
    if call is None or call[1] not in KNOWN:
        raise ValueError(f"adapter {text!r} is unknown; known are {', '.join(KNOWN)}, as in lora(16, alpha=32)")
    kind = KNOWN[call[1]]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    given: dict[str, Any] = {}
    for position, argument in enumerate(filter(None, map(str.strip, (call[2] or "").split(",")))):
        name, equals, value = map(str.strip, argument.partition("="))
        if not equals and position == 0:
            name, value = next(iter(fields)), name
        if name not in fields or name in given:
            raise ValueError(f"adapter {text!r}: {argument!r} is none of {', '.join(fields)}, once, as name=value")
        given[name] = _read(value, hints[name], f"adapter {text!r}: {name}")
    return kind(**given)


def _read(value: str, hint: Any, where: str) -> Any:
    if hint is str or typing.get_origin(hint) is Literal:
        return value
    if value == "None" and type(None) in typing.get_args(hint):
        return None
    number = int if hint is int else float
    try:
        return number(value)
    except ValueError:
        raise ValueError(f"{where}={value!r} is no {'whole ' if number is int else ''}number") from None
