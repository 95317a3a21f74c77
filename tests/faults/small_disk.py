"""A disk of its own under a folder, small enough to be filled to the last byte."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

MEBIBYTES = 96


class SmallDisk:
    """A file system in memory, mounted at `folder`, which is made. Takes the rights of root."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ballast = folder / ".ballast"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={MEBIBYTES}m", "tmpfs", folder], check=True)

    def fill(self) -> None:
        """Leave no room for another page."""
        with self._ballast.open("ab", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                while True:
                    try:
                        if file.write(bytes(size)) < size:
                            break
                    except OSError:
                        break

    def make_room(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        subprocess.run(["umount", self._folder], check=True)


def can_mount() -> bool:
    """Whether this account may mount file systems, as root may."""
    return os.geteuid() == 0
