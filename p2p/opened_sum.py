"""A node's note on disk of the members of an epoch's sum, before it opens it. A restart must not make it forget."""

from __future__ import annotations

import json
from pathlib import Path

from core_training.foundation.durable import commit_file


class OpenedSum:
    """The newest note, in `file`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._epoch: int | None = None
        self._members: tuple[str, ...] = ()
        if file.exists():
            document = json.loads(file.read_text(encoding="utf-8"))
            self._epoch, self._members = document["epoch"], tuple(document["members"])

    def members(self, epoch: int) -> tuple[str, ...] | None:
        """The members of the sum opened in this epoch; None where none was.

        Empty for an epoch before the noted one: a node comes back to it when its last commit is damaged.
        """
        if self._epoch is None or epoch > self._epoch:
            return None
        return self._members if epoch == self._epoch else ()

    def note(self, epoch: int, members: tuple[str, ...]) -> None:
        """Note the members of a sum before it is opened. Raises RunError when the disk refuses."""
        commit_file(self._file, json.dumps({"epoch": epoch, "members": list(members)}).encode())
        self._epoch, self._members = epoch, members
