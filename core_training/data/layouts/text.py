"""Plain texts."""

from __future__ import annotations

from core_training.data.layout import Layout, Raw
from core_training.data.turns import text_of
from core_training.parts.data_kinds.values import Text


def _read_text(raw: Raw) -> Text:
    return Text(text_of("text", raw["text"]))


LAYOUTS = (Layout(("text",), _read_text),)
