"""A node's note on disk of the members of a round's sum, before it opens it. A restart must not make it forget."""

from __future__ import annotations

import json
from pathlib import Path

from core_training.foundation.bounded_reading import read_json
from core_training.foundation.durable import commit_file


class OpenedSum:
    """The newest note, in `file`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._round: int | None = None
        self._members: tuple[str, ...] = ()
        if file.exists():
            document = read_json(file)
            self._round, self._members = document["epoch"], tuple(document["members"])

    def members(self, number: int) -> tuple[str, ...] | None:
        """The members of the sum opened in this round; None where none was.

        Empty for a round before the noted one: a node comes back to it when its last commit is damaged.
        """
        if self._round is None or number > self._round:
            return None
        return self._members if number == self._round else ()

    def note(self, number: int, members: tuple[str, ...]) -> None:
        """Note the members of a sum before it is opened. Raises RunError when the disk refuses."""
        commit_file(self._file, json.dumps({"epoch": number, "members": list(members)}).encode())
        self._round, self._members = number, members
