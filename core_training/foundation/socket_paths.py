"""Names of unix sockets' folders that are short enough: a socket's address holds about a hundred bytes, a path more."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core_training.foundation.errors import InputError

LONGEST_ADDRESS = 103
"""Bytes of a socket's path, where there are fewest: on macOS. Linux has four more."""


@contextmanager
def short_path(folder: Path, room: int) -> Iterator[Path]:
    """The absolute path of `folder`, or while the block runs a short link to it that only its owner can follow.

    `room` counts the bytes that a socket's path has after the folder's. Raises InputError where a link is too long.
    """
    path = folder.absolute()
    if _fits(path, room):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="fedloom-") as private:
        link = Path(private) / "f"
        if not _fits(link, room):
            raise InputError(
                f"{path}: the path is too long for a socket, and so is that of the folder for temporary files, "
                f"{tempfile.gettempdir()}; set TMPDIR to a shorter one, such as /tmp"
            )
        link.symlink_to(path)
        yield link


def _fits(folder: Path, room: int) -> bool:
    return len(os.fsencode(folder)) + room <= LONGEST_ADDRESS
