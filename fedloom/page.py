"""An HTML page with everything in it, pictures included, that opens anywhere and fetches nothing."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import Any

from fedloom.pictures import rendered


def page(title: str, parts: Sequence[str]) -> str:
    """The page of these parts, which are HTML already."""
    return _FRAME.format(title=html.escape(title), body="\n".join(parts))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def image(figure: Any, description: str) -> str:
    """A matplotlib figure, within the page."""
    encoded = base64.b64encode(rendered(figure, "svg")).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/svg+xml;base64,{encoded}">'


_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; }}
img {{ max-width: 100%; display: block; margin: 1.5rem 0; }}
table {{ border-collapse: collapse; margin: 1.5rem 0; display: block; overflow-x: auto; }}
th, td {{ padding: 0.3rem 0.8rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
pre {{ background: #f5f5f5; padding: 1rem; overflow-x: auto; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
