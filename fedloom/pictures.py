"""Pictures: the colours, frames and files that all of them have alike. Knows nothing of runs."""

from __future__ import annotations

import io
from typing import Any

COLOURS = ("#b5651d", "#2a6f97", "#3a8f5c", "#555555", "#8d5a97", "#c44e52", "#937860", "#4c72b0")


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, in inches."""
    # The object interface, not pyplot: no display, no global state.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def rendered(figure: Any, kind: str) -> bytes:
    """A figure as the content of an `svg` or `png` file: the same figure gives the same bytes."""
    import matplotlib

    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
    stream = io.BytesIO()
    # Without date, version and random identifiers the same runs give the same bytes.
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "fedloom"}):
        figure.savefig(stream, format=kind, dpi=100, facecolor="white", metadata=metadata)
    return stream.getvalue()
