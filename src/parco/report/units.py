"""Quantities as people read them: three or four significant digits and a unit."""

import math

SMALL = 5e-4  # a loss below this has at most one digit among its first four decimals


def size(nbytes: float | None) -> str:
    """Bytes in decimal units: `31.2 MB`."""
    if nbytes is None:
        return "not measured"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(nbytes) >= scale:
            return f"{significant(nbytes / scale)} {unit}"
    return f"{nbytes:.0f} B"


def duration(seconds: float | None) -> str:
    """Seconds in the unit that leaves one to three digits before the point: `4.18 ms`, `2 min 5 s`."""
    if seconds is None:
        return "not measured"
    if abs(seconds) >= 60:
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(seconds) >= scale:
            return f"{significant(seconds / scale)} {unit}"
    return f"{significant(seconds * 1e9)} ns" if seconds else "0 s"


def speed(tokens_per_second: float | None) -> str:
    """Tokens per second, three significant digits."""
    return "not measured" if tokens_per_second is None else f"{significant(tokens_per_second)} tok/s"


def rate(per_second: float, unit: str) -> str:
    """An amount per second in steps of a thousand: `12.3 GB/s`, `1.4 T/s`."""
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if per_second >= scale:
            return f"{significant(per_second / scale)} {prefix}{unit}/s"
    return f"{significant(per_second)} {unit}/s"


def nats(loss: float | None) -> str:
    """A loss in nats per token, four decimals; very small ones keep two digits."""
    if loss is None:
        return "not measured"
    return f"{loss:.1e}" if 0 < abs(loss) < SMALL else f"{loss:.4f}"


def rise(difference: float | None) -> str:
    """A signed difference of losses in nats per token; very small ones keep two digits."""
    if difference is None:
        return "not measured"
    if 0 < abs(difference) < SMALL:
        return f"{difference:+.1e}"
    return f"{difference:+.4f}"


def percent(fraction: float | None) -> str:
    """A fraction as percent, one decimal."""
    return "not measured" if fraction is None else f"{100 * fraction:.1f}%"


def times(ratio: float | None) -> str:
    """A ratio: `1.42×`."""
    return "" if ratio is None or not math.isfinite(ratio) else f"{significant(ratio)}×"


def significant(value: float) -> str:
    """Three significant digits without an exponent, thousands apart."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = float(f"{value:.3g}")
    digits = 2 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(0, digits)}f}"
