"""On disk: with whom a node has opened a sum in an epoch, before it opens it. A restart must not make it forget."""

from __future__ import annotations

import json
from pathlib import Path

from core_training.foundation.durable import commit_file


class OpenedSum:
    """The newest one, in `file`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._epoch: int | None = None
        self._members: tuple[str, ...] = ()
        if file.exists():
            document = json.loads(file.read_text(encoding="utf-8"))
            self._epoch, self._members = document["epoch"], tuple(document["members"])

    def members(self, epoch: int) -> tuple[str, ...] | None:
        """Those with whom a sum was opened in this epoch; None where none was.

        Nobody for an epoch before the noted one: a node comes back to it when its last commit is damaged.
        """
        if self._epoch is None or epoch > self._epoch:
            return None
        return self._members if epoch == self._epoch else ()

    def note(self, epoch: int, members: tuple[str, ...]) -> None:
        """A sum of these members is about to be opened. Raises RunError when the disk refuses."""
        commit_file(self._file, json.dumps({"epoch": epoch, "members": list(members)}).encode())
        self._epoch, self._members = epoch, members
