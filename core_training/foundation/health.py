"""What a status command tells whoever alarms on it: one of three exit codes."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum


class Health(IntEnum):
    """The exit codes of status commands."""

    WELL = 0
    NEEDS_A_PERSON = 3
    NOT_RUNNING = 4


def health(attention: Sequence[str], *, running: bool) -> Health:
    """The code for what runs or does not, and for what a person should see to."""
    if not running:
        return Health.NOT_RUNNING
    return Health.NEEDS_A_PERSON if attention else Health.WELL
