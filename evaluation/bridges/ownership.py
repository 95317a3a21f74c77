"""Who could have made or changed what is about to be run: this account and root alone, or others too."""

from __future__ import annotations

import os
import stat
import sys
from contextlib import suppress
from pathlib import Path

_OF_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def why_distrusted(path: Path) -> str | None:
    """Why an account besides this one and root could have put there what is there, or change it; None where none could.

    A link is held to what it leads to as well, unless that is the interpreter that runs this. Nothing is said of the
    folders that it lies in.
    """
    status = path.lstat()
    if (why := _why(path, status)) is not None or not stat.S_ISLNK(status.st_mode):
        return why
    target = path.resolve()
    if target == Path(sys.executable).resolve():
        return None
    return _why(target, target.stat())


def take_from_others(folder: Path) -> None:
    """Take from everybody but the owner the right to change a folder and all that is in it."""
    for path in (folder, *folder.rglob("*")):
        status = path.lstat()
        if not stat.S_ISLNK(status.st_mode) and status.st_mode & _OF_OTHERS:
            path.chmod(stat.S_IMODE(status.st_mode) & ~_OF_OTHERS)


def make_for_oneself(folder: Path) -> None:
    """Make a folder, and those above it that are missing, which others cannot change whatever the umask is."""
    if folder.is_dir():
        return
    make_for_oneself(folder.parent)
    with suppress(FileExistsError):  # another process was quicker
        folder.mkdir(mode=0o755)


def _why(path: Path, status: os.stat_result) -> str | None:
    if status.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to another account (number {status.st_uid})"
    if not stat.S_ISLNK(status.st_mode) and status.st_mode & _OF_OTHERS:
        return f"{path} can be changed by other accounts (`chmod go-w {path}` ends that)"
    return None
