"""The tools of the fault matrix do what a cell relies on: clocks move, disks are full, lines break."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults.clocks import Clocks
from tests.faults.line import Line
from tests.faults.small_disk import SmallDisk, can_mount

TELLS_TIME = """
import sys, time
from datetime import datetime
for _ in sys.stdin:
    print(time.time(), datetime.now().timestamp(), time.monotonic(), flush=True)
"""


def test_one_processs_wall_clock_jumps_and_comes_back_and_its_monotonic_one_does_not(tmp_path: Path) -> None:
    clocks = Clocks(tmp_path / "clocks")
    command, pipe = [sys.executable, "-c", TELLS_TIME], subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, text=True, env={**os.environ, **clocks.environment}
    ) as process:

        def told() -> tuple[float, ...]:
            time.sleep(0.02)  # it looks for its file a hundred times a second
            process.stdin.write("\n")
            process.stdin.flush()
            return tuple(float(word) for word in process.stdout.readline().split())

        for moved in (0, 3600, 0, -3600):
            clocks.move([process.pid], moved)
            wall, date, monotonic = told()
            assert wall - time.time() == pytest.approx(moved, abs=1)
            assert date - time.time() == pytest.approx(moved, abs=1)
            assert monotonic == pytest.approx(time.monotonic(), abs=1)


@pytest.mark.skipif(not can_mount(), reason="mounting takes the rights of root")
def test_a_full_disk_has_no_room_until_it_is_made(tmp_path: Path) -> None:
    disk = SmallDisk(tmp_path / "disk")
    try:
        disk.fill()
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            (tmp_path / "disk" / "file").write_bytes(b"one byte more")
        disk.make_room()
        (tmp_path / "disk" / "file").write_bytes(b"one byte more")
    finally:
        disk.close()


@pytest.fixture
def heard() -> list[bytes]:
    """What was said to `echo`, a list entry for each connection."""
    return []


@pytest.fixture
def line(heard: list[bytes]) -> Iterator[Line]:
    """A line to a server that answers each word with the same word."""

    def answer(connection: socket.socket) -> None:
        heard.append(b"")
        number = len(heard) - 1
        with suppress(OSError), connection:
            while word := connection.recv(100):
                heard[number] += word
                connection.sendall(word)

    def serve() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        made = Line(listener.getsockname())
        yield made
        made.close()


def connect(line: Line) -> socket.socket:
    host, _, port = line.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def test_a_cut_line_resets_what_is_there_and_what_comes_until_it_is_mended(line: Line) -> None:
    with connect(line) as before:
        before.sendall(b"one")
        assert before.recv(100) == b"one"
        line.cut()
        with pytest.raises(ConnectionError):
            before.recv(100)
    with pytest.raises(ConnectionError), connect(line) as during:
        during.recv(100)
    line.mend()
    with connect(line) as after:
        after.sendall(b"three")
        assert after.recv(100) == b"three"


def test_a_delayed_line_lets_everything_through_in_the_end(line: Line) -> None:
    with connect(line) as connection:
        line.hold()
        connection.sendall(b"one")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(100)
        line.mend()
        connection.settimeout(10)
        assert connection.recv(100) == b"one"


def test_a_doubling_line_sends_everything_again_and_loses_answers(line: Line, heard: list[bytes]) -> None:
    with connect(line) as connection:
        connection.sendall(b"one")
        assert connection.recv(100) == b"one"
        line.double()
        connection.sendall(b"two")
        with suppress(ConnectionError):
            assert connection.recv(100) == b""
    deadline = time.monotonic() + 10
    while sorted(heard) != [b"one", b"onetwo"]:
        assert time.monotonic() < deadline, heard
        time.sleep(0.01)
