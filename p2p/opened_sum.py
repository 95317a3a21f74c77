"""A node's note on disk of a round's sum before it opens it: of whom, and on what scale. A restart forgets nothing."""

from __future__ import annotations

import json
from pathlib import Path

from core_training.foundation.bounded_reading import read_json
from core_training.foundation.durable import commit_file
from strategies.ring_scale import Scale


class OpenedSum:
    """The newest note, in `file`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._round: int | None = None
        self._members: tuple[str, ...] = ()
        self._scale: Scale | None = None
        if file.exists():
            document = read_json(file)
            self._round, self._members = document["epoch"], tuple(document["members"])
            self._scale = Scale.from_json(document["scale"]) if document.get("scale") else None

    def members(self, number: int) -> tuple[str, ...] | None:
        """The members of the sum opened in this round; None where none was.

        Empty for a round before the noted one: a node comes back to it when its last commit is damaged.
        """
        if self._round is None or number > self._round:
            return None
        return self._members if number == self._round else ()

    def scale(self, number: int) -> Scale | None:
        """The scale of the sum opened in this round; None where none was."""
        return self._scale if number == self._round else None

    def note(self, number: int, members: tuple[str, ...], scale: Scale) -> None:
        """Note a sum before it is opened. Raises RunError when the disk refuses."""
        document = {"epoch": number, "members": list(members), "scale": scale.model_dump()}
        commit_file(self._file, json.dumps(document).encode())
        self._round, self._members, self._scale = number, members, scale
