"""Bars of contenders, one plot below the other, whose axes end at what the machine was measured to reach, or at the
longest bar where that is beyond it and the peak is a line: a probe may have been slowed by other work.
"""

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
    """Plot number `place` of a figure: a bar of `values` in 10⁹ for each name, ours in another colour, beside the peak
    `top`.
    """
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
    peak = top / 1e9
    end = max([peak, *values])
    if end > peak:
        drawn.add_vline(x=peak, line={"color": "#b03a4c", "dash": "dot"}, row=place, col=1)
    title = f"{title}; the {'line is' if end > peak else 'axis ends at'} this machine's measured peak"
    drawn.update_xaxes(range=[0, end], title=title, row=place, col=1)
    drawn.update_yaxes(autorange="reversed", row=place, col=1)


def finish(drawn: Any, title: str, count: int) -> Any:
    """The figure of `count` plots under its title."""
    drawn.update_layout(title=title, height=120 + 420 * count, template="plotly_white")
    return drawn
