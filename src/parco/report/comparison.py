"""Original beside fitted: the rows that the page and the terminal share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from parco.report import units

if TYPE_CHECKING:
    from parco.fitting.result import Column, Result

Verdict = Literal["good", "bad", ""]
NOTICEABLE = 0.01  # a speed or a size within 1% is the same: repeated measurements differ by that much


class Row(NamedTuple):
    """One quantity of two models as text; `verdict` says whether the fitted one is noticeably better or worse."""

    name: str
    note: str
    original: str
    fitted: str
    change: str
    verdict: Verdict


def compare(original: Column, fitted: Column, prefill_tokens: int | None = None) -> list[Row]:
    """The rows of the table, quality after size, speed last."""
    rise = fitted["loss"] - original["loss"]
    prompt = f"tok/s, prompt of {prefill_tokens}" if prefill_tokens else "tok/s"
    rows = [
        Row(
            "Size",
            f"{units.percent(fitted['fraction'])} of the bf16 checkpoint",
            units.size(original["bytes"]),
            units.size(fitted["bytes"]),
            units.times(fitted["bytes"] / original["bytes"]),
            _verdict(original["bytes"] / fitted["bytes"]),
        ),
        Row(
            "Held-out loss",
            "nats per token",
            units.nats(original["loss"]),
            units.nats(fitted["loss"]),
            units.rise(rise),
            "good" if rise <= 0 else "",
        ),
        Row(
            "Perplexity",
            "",
            units.significant(original["perplexity"]),
            units.significant(fitted["perplexity"]),
            units.times(fitted["perplexity"] / original["perplexity"]),
            "",
        ),
        Row("KL to the original", "nats per token", "", units.nats(fitted["kl"]), "", ""),
        Row("Same most likely token", "as the original", "", units.percent(fitted["top1"]), "", ""),
        _speed("Prefill", prompt, original["prefill"], fitted["prefill"]),
        _speed("Decode", "tok/s, one sequence", original["decode"], fitted["decode"]),
    ]
    before, after = original["memory"], fitted["memory"]
    if before is not None and after is not None:
        change, verdict = units.times(after / before), _verdict(before / after)
        rows.append(Row("Peak memory", "load and decode", units.size(before), units.size(after), change, verdict))
    return rows


def describe(column: Column) -> list[tuple[str, str]]:
    """One model alone, as names and values; what was not measured is left out."""
    rows = [
        ("Size", f"{units.size(column['bytes'])}, {units.percent(column['fraction'])} of the bf16 checkpoint"),
        ("Held-out loss", f"{units.nats(column['loss'])} nats per token"),
        ("Perplexity", units.significant(column["perplexity"])),
        ("Prefill", units.speed(column["prefill"])),
        ("Decode", units.speed(column["decode"])),
    ]
    return [*rows, ("Peak memory", units.size(column["memory"]))] if column["memory"] is not None else rows


def lead(result: Result) -> str:
    """The outcome in two sentences."""
    original, fitted, target = result["original"], result["fitted"], result["target"]
    rise = fitted["loss"] - original["loss"]
    outcome = (
        f"{units.size(fitted['bytes'])} instead of {units.size(original['bytes'])}, "
        f"{units.percent(fitted['fraction'])} of the bf16 checkpoint. On this machine it decodes "
        f"{units.times(fitted['decode'] / original['decode'])} and prefills "
        f"{units.times(fitted['prefill'] / original['prefill'])} as fast, for {units.rise(rise)} nats per token."
    )
    asked = {"size": "a size of at most", "speed": "a decode speed of at least", "loss": "a loss higher by at most"}
    unit = {"size": " of the checkpoint", "speed": "×", "loss": " nats"}[target["kind"]]
    verb = "reached" if target["met"] else "not met"
    return f"{outcome} Asked: {asked[target['kind']]} {target['value']:g}{unit}; {verb}: {target['reached']:.4g}{unit}."


def _speed(name: str, note: str, original: float, fitted: float) -> Row:
    ratio = fitted / original
    return Row(name, note, units.significant(original), units.significant(fitted), units.times(ratio), _verdict(ratio))


def _verdict(improvement: float) -> Verdict:
    if improvement > 1 + NOTICEABLE:
        return "good"
    return "bad" if improvement < 1 - NOTICEABLE else ""
