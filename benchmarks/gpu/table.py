"""What was measured, as a table for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The table's lines, in Markdown."""
    yield "| part | tokens/s | MFU | peak memory | |"
    yield "|---|---|---|---|---|"
    for part in report["parts"]:
        for name, figures, remark in _rows(part):
            yield f"| {name} | {_speed(figures)} | {_mfu(figures)} | {_memory(figures)} | {remark} |"


def _rows(part: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """A part's rows: name, figures, remark."""
    name, result = part["name"], part.get("result", {})
    for reason in ("failed", "skipped", "not_measured"):
        if reason in part:
            yield name, {}, f"{reason.replace('_', ' ')}: {part[reason]}"
            return
    if "cells" in result:
        wrong = [cell for cell in result["cells"] if "loss_last" not in cell]
        remarks = [f"{c['stage']} × {c['tuning']}: {c.get('failed', c.get('skipped'))}" for c in wrong[:3]]
        yield name, {}, "; ".join([f"{result['ran']} of {result['of']} cells ran", *remarks])
    elif "tokens_per_second" in result:
        yield name, result, ""
    else:
        for layout, figures in result.items():
            if isinstance(figures, dict):
                refused = figures.get("refused")
                yield f"{name}, {layout}", {} if refused else figures, f"refused: {refused}" if refused else ""


def _speed(figures: dict[str, Any]) -> str:
    return f"{figures['tokens_per_second']:,.0f}" if figures else ""


def _mfu(figures: dict[str, Any]) -> str:
    return f"{figures['mfu']:.0%}" if figures.get("mfu") is not None else ""


def _memory(figures: dict[str, Any]) -> str:
    return f"{figures['peak_bytes'] / 2**30:.2f} GiB" if figures else ""
