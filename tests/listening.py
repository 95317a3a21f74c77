"""What processes listen on, as the kernel knows it, and the table of docs/security.md that says what they may."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import psutil
import pytest

PAGE = Path(__file__).parents[1] / "docs" / "security.md"
needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads who listens from Linux's /proc")
_ACCEPTS = 0x10000
"""The flag of a listening socket in /proc/net/unix."""


@dataclass(frozen=True)
class Listener:
    """A socket that takes calls, and the command line of a process that holds it: `tcp:HOST:PORT` or `unix:PATH`."""

    address: str
    command: str


@dataclass(frozen=True)
class Door:
    """A row of the table: which process of which mode may listen where. The address is a pattern, as of file names."""

    mode: str
    process: str
    address: str

    def admits(self, listener: Listener, places: Mapping[str, str]) -> bool:
        """Whether this row stands for `listener`; `places` says what the names in capitals are in this deployment."""
        pattern = re.sub(r"HOST:PORT|[A-Z]{3,}", lambda name: places.get(name[0], name[0]), self.address)
        return self.process in listener.command and fnmatchcase(listener.address, pattern)


def doors(mode: str | None = None) -> list[Door]:
    """The rows of the table, or those of one mode."""
    rows = re.findall(r"^\| ([^|]+) \| `([^`|]+)` \| `((?:tcp|unix):[^`|]+)` \|", PAGE.read_text("utf-8"), re.M)
    return [Door(*row) for row in rows if mode in (None, row[0])]


def listeners(processes: Iterable[psutil.Process]) -> set[Listener]:
    """What these processes and all that they started listen on."""
    found = set()
    unix = _unix_sockets()
    for process in _with_descendants(processes):
        try:
            command = " ".join(process.cmdline())
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN or (connection.type.name == "SOCK_DGRAM"):
                    kind = "tcp" if connection.type.name == "SOCK_STREAM" else "udp"
                    host = connection.laddr.ip.removeprefix("::ffff:")
                    found.add(Listener(f"{kind}:{host}:{connection.laddr.port}", command))
            for inode in _sockets_of(process.pid):
                if inode in unix:
                    found.add(Listener(f"unix:{_resolved(unix[inode])}", command))
        except psutil.NoSuchProcess:
            continue
    return found


def assert_as_told(mode: str, seen: set[Listener], places: Mapping[str, str]) -> None:
    """Each listener has its row in the table, each row a listener, and no other account reaches a socket's path."""
    rows = doors(mode)
    assert rows, f"docs/security.md tells nothing of the mode '{mode}'"
    untold = [one for one in seen if not any(row.admits(one, places) for row in rows)]
    assert untold == [], f"{mode}: docs/security.md does not tell of them"
    unseen = [row for row in rows if not any(row.admits(one, places) for one in seen)]
    assert unseen == [], f"{mode}: docs/security.md tells of them, and there is but {seen}"
    paths = [Path(one.address.removeprefix("unix:")) for one in seen if one.address.startswith("unix:/")]
    assert [path for path in paths if not is_private(path)] == []


def is_private(path: Path) -> bool:
    """Whether no other account can open a file: it or a folder above it is closed to all but this one."""
    closed = [os.stat(path).st_mode & 0o077 == 0]
    closed += [os.stat(folder).st_mode & 0o011 == 0 for folder in path.resolve().parents]
    return any(closed) and os.stat(path).st_uid == os.getuid()


def _with_descendants(processes: Iterable[psutil.Process]) -> set[psutil.Process]:
    found = set()
    for process in processes:
        found |= {process, *process.children(recursive=True)}
    return found


def _unix_sockets() -> dict[str, str]:
    """The paths of all listening unix sockets by their inode; a name without a file begins with '@'."""
    rows = [line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return {row[6]: row[7] if len(row) > 7 else "(unnamed)" for row in rows if int(row[3], 16) & _ACCEPTS}


def _resolved(path: str) -> str:
    """A socket's path without the links through which it was bound."""
    return str(Path(path).resolve()) if path.startswith("/") else path


def _sockets_of(process: int) -> set[str]:
    """The inodes of a process's sockets."""
    inodes = set()
    for descriptor in Path(f"/proc/{process}/fd").iterdir():
        try:
            if stat.S_ISSOCK(descriptor.stat().st_mode):
                inodes.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
        except FileNotFoundError:
            continue
    return inodes
