"""Bars of contenders, one plot below the other, whose axes end at what the machine was measured to reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def add(
    drawn: Any,
    place: int,
    names: Sequence[str],
    values: Sequence[float],
    title: str,
    top: float,
    texts: Sequence[str] | None = None,
) -> None:
    """Plot number `place` of a figure: a bar of `values` in 10⁹ for each name, ours in another colour, up to `top`."""
    import plotly.graph_objects as graph

    drawn.add_trace(
        graph.Bar(
            x=list(values),
            y=list(names),
            text=None if texts is None else list(texts),
            orientation="h",
            marker={"color": ["#3d6fb6" if name.startswith("parco") else "#9a9a9a" for name in names]},
            showlegend=False,
        ),
        row=place,
        col=1,
    )
    title = f"{title}; the axis ends at this machine's peak"
    drawn.update_xaxes(range=[0, top / 1e9], title=title, row=place, col=1)
    drawn.update_yaxes(autorange="reversed", row=place, col=1)


def finish(drawn: Any, title: str, count: int) -> Any:
    """The figure of `count` plots under its title."""
    drawn.update_layout(title=title, height=120 + 420 * count, template="plotly_white")
    return drawn
