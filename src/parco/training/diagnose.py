"""Which layers and products make a run degrade, and a way out: a higher precision for these, and for nothing else.

The errors of a product's two operands are independent, so those of its numbers, relative to the size of the terms, are
the sum of both: 10^(-a/10) + 10^(-b/10) at signal-to-noise ratios of a and b dB. Findings are ranked by that.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from parco.formats import Float, Integer, ScaleAbsmax, ScaleAbsmean, ScaleE8M0
from parco.training.prepare import follow
from parco.training.readings import Reading, Readings
from parco.training.recipe import FACTORS, PRODUCTS, Operand, Pair, ProductName, Recipe
from parco.training.watch import prepared_layers

MARGIN = 6.02
"""dB: twice the error, which is what one bit of mantissa less costs."""
CREST = 16.0
"""The greatest magnitude over the root mean square at which integers under their own amax still count as healthy.

Normal numbers have 4 to 5 among 10^4 to 10^6; activations of trained transformers tens."""
MOST_LOST = 0.5
"""Share of underflow: with more than half of an operand's numbers at zero, most terms of the sums are missing, however
large the few numbers are that dominate the ratio of squares."""
DROWNED = 10 * math.log10(3)
"""dB: a gradient whose norm is less than sqrt(3) times that of its error no longer trains (arXiv 2505.19115)."""


@dataclass(frozen=True)
class Finding:
    """A product of a layer that loses too much, and why, in words. `noise` is that of its numbers, relative."""

    layer: str
    product: ProductName
    why: str
    noise: float

    def __str__(self) -> str:
        return f"{self.layer} {self.product}: {self.why}"


def promised(operand: Operand) -> float | None:
    """The least signal-to-noise ratio, in dB, of numbers within the range of the operand's format; None where a format
    promises none (ternary, tables).

    A float of m bits of mantissa is off by at most half of 2^-m of a number, uniformly: 2^-2m / 12 of its square at
    the most. An integer of steps s under its amax is off by s^2 / 12, with amax = `CREST` root mean squares. Stochastic
    rounding has twice the square.
    """
    element = operand.format.element
    stochastic = 10 * math.log10(2) * (operand.rounding == "stochastic")
    if isinstance(element, Float):
        return 10 * math.log10(12) + 20 * element.mantissa_bits * math.log10(2) - stochastic
    if isinstance(element, Integer) and not isinstance(operand.format.scale, ScaleAbsmean):
        steps = element.greatest if isinstance(operand.format.scale, ScaleAbsmax) else (element.codes - 1) / 2
        return 10 * math.log10(12) + 20 * math.log10(steps / CREST) - stochastic
    return None


def diagnose(readings: Readings | Sequence[Readings]) -> list[Finding]:
    """The products of `readings`, or of the last of several (`Watch.history`), that lose too much, the noisiest first.

    An operand is at fault where its signal-to-noise ratio is
    - 6 dB under what its format promises to numbers within its range (`promised`): so they are not within it;
    - 6 dB under the median of its earlier readings in the same format, and under what is promised;
    - of a gradient, under 4.8 dB, at which training stops to work;
    or where more than half of its numbers became 0. An operand that is not finite before it is written is no fault of
    its format, and none is found. ValueError without readings.
    """
    history = [readings] if isinstance(readings, Readings) else list(readings)
    if not history:
        raise ValueError("readings=[]: there is nothing to judge")
    earlier: dict[tuple[str, str, str, str], list[float]] = {}
    for each in history[:-1]:
        for one in each.operands:
            if not math.isnan(one.snr_db):
                earlier.setdefault(_key(one), []).append(one.snr_db)
    pairs: dict[tuple[str, ProductName], list[Reading]] = {}
    for one in history[-1].operands:
        pairs.setdefault((one.layer, one.product), []).append(one)
    found: list[Finding] = []
    for (layer, product), pair in pairs.items():
        reasons = [reason for one in pair for reason in _faults(one, earlier.get(_key(one), []))]
        if reasons:
            noise = sum(10 ** (-one.snr_db / 10) for one in pair if not math.isnan(one.snr_db))
            found.append(Finding(layer, product, "; ".join(reasons), noise))
    return sorted(found, key=lambda each: -each.noise)


def _key(one: Reading) -> tuple[str, str, str, str]:
    return one.layer, one.product, one.operand, one.written


def _faults(one: Reading, earlier: list[float]) -> list[str]:
    """What is wrong with one operand."""
    if math.isnan(one.snr_db):
        return []
    least = promised(Operand.parse(one.written))
    before = statistics.median(earlier) if earlier else None
    name = f"{one.operand} in {one.written}"
    lost = f" ({one.underflow:.0%} of its numbers became 0, {one.saturated:.1%} lie beyond its greatest)"
    if least is not None and one.snr_db < least - MARGIN:
        return [f"{name} has {one.snr_db:.1f} dB where the format promises {least:.1f}{lost}"]
    if before is not None and one.snr_db < before - MARGIN and (least is None or one.snr_db < least):
        return [f"{name} fell from {before:.1f} to {one.snr_db:.1f} dB{lost}"]
    if one.operand == "grad" and one.snr_db < DROWNED:
        return [f"{name} has {one.snr_db:.1f} dB, and under {DROWNED:.1f} a gradient drowns in its error{lost}"]
    if one.underflow > MOST_LOST:
        return [f"of {name} {one.underflow:.0%} became 0, at amax {one.amax:.1e}"]
    return []


def fall_back_(model: torch.nn.Module, found: Iterable[Finding]) -> list[str]:
    """Moves the products that were `found` to the next higher precision, in place, and says in words what it did.

    The ladder: formats of few bits, and of eight under scales that are not MX's, go to mxfp8; mxfp8 and fp16 to bf16.
    Of a pair the operands on the lower rung move, without their roundings and options; other products stay, but for
    operands that reuse what a product that moved has written, which follow it. Delayed scales that are still needed
    keep their histories. Nothing moves from bf16.

    Raises ValueError for a layer that `model` has not, or that follows no recipe.
    """
    layers = prepared_layers(model)
    done: list[str] = []
    for each in found:
        if each.layer not in layers:
            raise ValueError(f"layer {each.layer!r} is no prepared layer of {type(model).__name__}")
        layer = layers[each.layer]
        recipe: Recipe = layer._recipe
        higher = raised(recipe, each.product)
        if higher is None:
            done.append(f"{each.layer} {each.product}: stays {recipe.pair(each.product)}, there is nothing higher")
            continue
        follow(layer, higher, keeps_scales=True)
        changed = [
            f"{name}: from {recipe.pair(name)} to {higher.pair(name)}"
            for name in sorted(PRODUCTS, key=lambda name: name != each.product)
            if recipe.pair(name) != higher.pair(name)
        ]
        done.append(f"{each.layer} " + ", and with it ".join(changed))
    return done


def raised(recipe: Recipe, product: ProductName) -> Recipe | None:
    """`recipe` with `product` in the next higher precision; None where it is at the top."""
    pair = recipe.pair(product)
    rung = min(map(_rung, pair))
    if rung == len(_RUNGS):
        return None
    moved = [_RUNGS[rung] if _rung(operand) == rung else dataclasses.replace(operand, hadamard=0) for operand in pair]
    pairs = {name: recipe.pair(name) for name in PRODUCTS} | {product: Pair(*moved)}
    if product == "output":
        for name in ("grad_input", "grad_weight"):
            if pairs[name].right.reused:
                source = moved[("x", "weight").index(FACTORS[name][1])]
                pairs[name] = Pair(pairs[name].left, dataclasses.replace(source, reused=True))
    return dataclasses.replace(recipe, **pairs)


_RUNGS = [Operand.parse("mxfp8_e4m3"), Operand.parse("bf16")]


def _rung(operand: Operand) -> int:
    """How many of `_RUNGS` an operand is above or at."""
    if operand.format.is_dense:
        return 1 if str(operand.format) == "fp16" else 2
    return int(isinstance(operand.format.scale, ScaleE8M0) and operand.format.bits == 8)
