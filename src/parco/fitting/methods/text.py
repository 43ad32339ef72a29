"""Reads a Method back from its printed form."""

from __future__ import annotations

import re
from typing import cast

from parco.fitting.methods.factor import Factor, Metric
from parco.fitting.methods.joint import Joint
from parco.fitting.methods.method import Method
from parco.fitting.methods.prune import Prune, Score
from parco.fitting.methods.quantize import Keep, Quantize, Solver
from parco.fitting.methods.transform import Rotate, Rule, Scale
from parco.formats import Format

KNOWN = (
    "keep, a format (bf16, int8:row, int4:32, int3:64, int2:32:asym, nf4:64, fp8_e4m3:row, mxfp4, ...), "
    "format@rtn, format@gptq, format@actorder, factor(0.5), factor(rank=32), factor(0.5)>>int4:32, joint(0.5), "
    "int4:32+factor(rank=16), prune(2:4), prune(50%), prune(block:32), prune(2:4)>>int8:row, "
    "scale>>int4:64, scale(rule=smoothquant)>>int8:row, rotate>>int4:64"
)


def parse(text: str | Method) -> Method:
    """The method that `text` names: `parse(str(m)) == m`; a Method is returned as it is. ValueError names the known
    ones.
    """
    if isinstance(text, Method):
        return text
    plain = text.strip()
    for symbol in (">>", "+"):
        parts = plain.rpartition(symbol)
        if parts[1]:
            first, second = parse(parts[0]), parse(parts[2])
            try:
                return first >> second if symbol == ">>" else first + second
            except TypeError as reason:
                raise ValueError(f"method {text!r}: {reason}") from None
    if plain == "keep":
        return Keep()
    if plain in ("scale", "rotate"):
        return Scale() if plain == "scale" else Rotate()
    if call := re.fullmatch(r"(factor|joint|prune|scale|rotate)\((.*)\)", plain):
        return _CALLS[call[1]](call[2], plain)
    name, _, solver = plain.partition("@")
    try:
        form = Format.parse(name)
    except ValueError as reason:
        raise ValueError(f"method {text!r} is unknown ({reason}); known are {KNOWN}") from None
    return Quantize(form, cast(Solver, solver or "auto"))


def _parse_factor(inner: str, text: str) -> Factor:
    values = _arguments(inner, text, "factor", ("ratio", "rank", "metric", "format"))
    try:
        ratio = float(values["ratio"]) if "ratio" in values else None
        rank = int(values["rank"]) if "rank" in values else None
    except ValueError:
        raise ValueError(f"method {text!r}: ratio is a number such as 0.5 and rank a whole number such as 32") from None
    return Factor(ratio, rank, cast(Metric, values.get("metric", "auto")), values.get("format", "bf16"))


def _parse_prune(inner: str, text: str) -> Prune:
    values = _arguments(inner, text, "prune", ("pattern", "score", "format"))
    if "pattern" not in values:
        raise ValueError(f"method {text!r}: prune takes a pattern first, as in prune(2:4); known are {KNOWN}")
    return Prune(values["pattern"], cast(Score, values.get("score", "auto")), values.get("format", "bf16"))


def _parse_scale(inner: str, text: str) -> Scale:
    values = _arguments(inner, text, "scale", ("exponent", "rule"))
    try:
        exponent = float(values["exponent"]) if "exponent" in values else None
    except ValueError:
        raise ValueError(f"method {text!r}: exponent is a number such as 0.5") from None
    return Scale(exponent, cast(Rule, values.get("rule", "awq")))


def _parse_rotate(inner: str, text: str) -> Rotate:
    seed = _arguments(inner, text, "rotate", ("seed",))["seed"]
    if not seed.isdecimal():
        raise ValueError(f"method {text!r}: seed is a whole number such as 1")
    return Rotate(int(seed))


def _parse_joint(inner: str, text: str) -> Joint:
    return Joint(_parse_factor(inner, text))


_CALLS = {
    "factor": _parse_factor,
    "joint": _parse_joint,
    "prune": _parse_prune,
    "scale": _parse_scale,
    "rotate": _parse_rotate,
}


def _arguments(inner: str, text: str, owner: str, names: tuple[str, ...]) -> dict[str, str]:
    """The arguments by name; the first may come without its own, which is the first of `names`."""
    values: dict[str, str] = {}
    for position, argument in enumerate(inner.split(",")):
        name, given, value = (part.strip() for part in argument.partition("="))
        name, value = (name, value) if given else (names[0] if position == 0 else "", name)
        if name not in names or name in values or not value:
            raise ValueError(f"method {text!r}: {argument.strip()!r} is no argument of {owner}; known are {KNOWN}")
        values[name] = value
    return values
