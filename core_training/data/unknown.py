"""Parts of records that say something and that nothing here can use: refused, or left out and counted."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

_MEDIA = ("images", "image", "audio", "audios", "video", "videos", "documents")
UNUSED_COLUMNS = (*_MEDIA, "functions", "chat_template_kwargs")
"""Columns beside a conversation."""
UNUSED_PARTS = (*_MEDIA, "prefix")
"""Parts of a turn."""


def without_unused(fields: Mapping[str, Any], used: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """A record's fields without those parts, and what they are called; columns that are `used` stay."""
    left_out: dict[str, None] = {}
    kept: dict[str, Any] = {}
    for name, value in fields.items():
        if name in UNUSED_COLUMNS and name not in used and value:
            left_out[f"column '{name}'"] = None
        else:
            kept[name] = [_turn(one, left_out) for one in value] if isinstance(value, list) else _turn(value, left_out)
    return kept, list(left_out)


def _turn(value: Any, left_out: dict[str, None]) -> Any:
    """A turn without such parts; anything else as it is."""
    if not isinstance(value, dict) or not {"role", "from"} & value.keys():
        return value
    left_out |= {f"a turn's '{part}'": None for part in UNUSED_PARTS if value.get(part)}
    turn = {part: one for part, one in value.items() if part not in UNUSED_PARTS}
    if isinstance(parts := turn.get("content"), list):
        texts = [part for part in parts if not isinstance(part, dict) or part.get("type") == "text"]
        if not texts:  # a turn of nothing else would be an empty one
            return turn
        left_out |= {f"a content's part of type '{part.get('type')}'": None for part in parts if part not in texts}
        turn["content"] = texts
    return turn
