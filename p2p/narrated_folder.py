"""A run folder that tells each event to a listener as well: how a command or a simulation follows a node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from core_training.run_folder import RunFolder

Listener = Callable[[str, dict[str, Any]], None]


class NarratedFolder(RunFolder):
    """`listener(name, fields)` follows each event, after it is written."""

    def __init__(self, path: Path, listener: Listener) -> None:
        super().__init__(path)
        self._listener = listener

    def event(self, name: str, **fields: Any) -> None:
        super().event(name, **fields)
        self._listener(name, fields)
