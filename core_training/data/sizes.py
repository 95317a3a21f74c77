"""How large a file's records may be, and how much more than itself a file may unfold to."""

from __future__ import annotations

from pathlib import Path

LONGEST_RECORD = 64 * 2**20
"""Bytes of one record: twenty long books."""
UNFOLDS = "it unfolds to far more than its size; packed like this it is no record file"
_UNFOLDED = 256 * 2**20
_TIMES = 200
"""Records of text shrink to a fifth, and the most repetitive ones to a fiftieth."""


def most_unfolded(path: Path) -> int:
    """The bytes that a packed file may unfold to."""
    return max(_UNFOLDED, _TIMES * path.stat().st_size)
