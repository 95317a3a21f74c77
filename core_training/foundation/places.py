"""Questions about places that somebody wrote down: a name that no disk takes is nowhere, and no failure."""

from __future__ import annotations

from pathlib import Path


def is_folder(place: str | Path) -> bool:
    """Whether there is a folder."""
    try:
        return Path(place).is_dir()
    except OSError:  # as for a name of more letters than a disk takes
        return False


def is_there(place: str | Path) -> bool:
    """Whether there is anything."""
    try:
        return Path(place).exists()
    except OSError:
        return False
