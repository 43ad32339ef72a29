"""The frontier of plans as data for the chart.

Share of the checkpoint's bytes across, KL to the original up, decode time as colour.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from parco.report import units

if TYPE_CHECKING:
    from parco.fitting.result import Alternative, FrontierPoint, Result

LOG_SPAN = 20.0  # a logarithmic axis from this ratio of largest to smallest loss on


class Mark(NamedTuple):
    x: float
    y: float
    seconds: float | None
    text: str


def frontier(result: Result) -> dict[str, Any]:
    """What page.js draws. Every text is escaped: Plotly reads a little HTML in its labels."""
    points, rivals = result["frontier"], result["alternatives"]
    uniform = "uniform, healed" if result["heal"] else "uniform"
    stages = (
        ("predicted", "circle-open", 9, [_mark(point, "predicted_loss") for point in points]),
        ("measured", "circle", 9, _marks(points, "measured_loss")),
        ("measured, healed", "diamond", 10, _marks(points, "healed_loss")),
        (uniform, "square", 9, [_rival(rival) for rival in rivals if not rival["chosen"]]),
        ("chosen plan", "circle-open", 20, _chosen(points, rivals)),
    )
    traces = [
        {
            "name": name,
            "symbol": symbol,
            "size": size,
            "x": [mark.x for mark in marks],
            "y": [mark.y for mark in marks],
            "seconds": [mark.seconds and 1e3 * mark.seconds for mark in marks],
            "text": [mark.text for mark in marks],
            "plain": name in (uniform, "chosen plan"),
        }
        for name, symbol, size, marks in stages
        if marks
    ]
    shown = [mark for *_, marks in stages for mark in marks]
    losses = [mark.y for mark in shown]
    times = [1e3 * mark.seconds for mark in shown if mark.seconds]
    logarithmic = bool(losses) and min(losses) > 0 and max(losses) / min(losses) > LOG_SPAN
    return {
        "traces": traces,
        "x_title": "size, share of the bf16 checkpoint",
        "y_title": "KL to the original, nats per token",
        "y_axis": {"type": "log", "dtick": 1, "minor": {"ticks": "outside"}, "exponentformat": "power"}
        if logarithmic
        else {"rangemode": "tozero"},
        "color_title": "decode, ms per token",
        "seconds": [min(times), max(times)] if times else [0, 1],
        **_target_line(result),
    }


def _marks(points: Iterable[FrontierPoint], field: str) -> list[Mark]:
    return [_mark(point, field) for point in points if point[field] is not None]


def _mark(point: FrontierPoint, field: str) -> Mark:
    measured = point["measured_decode_seconds"]
    seconds = point["decode_seconds"] if measured is None else measured
    losses = {"predicted": "predicted_loss", "measured": "measured_loss", "healed": "healed_loss"}
    known = [f"{word} {units.nats(point[field])}" for word, field in losses.items() if point[field] is not None]
    lines = [
        f"<b>{escape(point['name'])}</b>",
        *(escape(part) for part in point["summary"].split(", ")),
        f"{units.percent(point['fraction'])} of the checkpoint, {units.size(point['bytes'])}",
        f"KL {', '.join(known)}",
        f"decode {units.duration(seconds)} per token ({'predicted' if measured is None else 'measured'})",
    ]
    return Mark(point["fraction"], point[field], seconds, "<br>".join(lines))


def _rival(rival: Alternative) -> Mark:
    healed = f"healed {rival['healed_steps']} steps, " if rival["healed_steps"] else ""
    text = (
        f"<b>{escape(rival['name'])}</b>"
        f"<br>{units.percent(rival['fraction'])} of the checkpoint, {units.size(rival['bytes'])}"
        f"<br>KL {units.nats(rival['kl'])}, loss {units.nats(rival['loss'])}"
        f"<br>{healed}held-out text"
    )
    return Mark(rival["fraction"], rival["kl"], None, text)


def _chosen(points: Iterable[FrontierPoint], rivals: Iterable[Alternative]) -> list[Mark]:
    """The chosen plan at its latest measurement, and again beside the uniform ones, on their text."""
    marks: list[Mark] = []
    for point in points:
        if point["chosen"]:
            fields = ("healed_loss", "measured_loss", "predicted_loss")
            marks.append(_mark(point, next(field for field in fields if point[field] is not None)))
    return marks + [_rival(rival) for rival in rivals if rival["chosen"]]


def _target_line(result: Result) -> dict[str, Any]:
    target = result["target"]
    if target["kind"] != "size":
        return {"shapes": [], "annotations": []}
    at = target["value"]
    line = {"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper"}
    label = {
        "x": at,
        "y": 1,
        "yref": "paper",
        "text": f"asked: {at:g}",
        "showarrow": False,
        "xanchor": "left",
        "yanchor": "top",
    }
    return {"shapes": [line], "annotations": [label]}
