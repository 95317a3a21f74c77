"""The supervisor's care for its processes, with real ones: starts that fail are made up for, the link is noted."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import pytest

import client.supervisor
from client.link import Link, note_link, read_link
from client.supervisor import Supervisor
from core_training.foundation import background
from core_training.foundation.kept_processes import KeptProcess, lock_of, log_of
from security.private_sockets import address_of

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_a_start_that_fails_is_made_up_for_after_a_while(tmp_path: Path) -> None:
    commands = iter([[str(tmp_path / "no-such-command")], SLEEP])
    process = KeptProcess(tmp_path, "worker", lambda: next(commands))
    try:
        assert not process.start()
        assert not process.is_due()
        assert not process.alive
        time.sleep(0.3)
        assert process.is_due()
        assert process.start()
        assert process.alive
    finally:
        process.stop()


def test_a_start_without_a_log_leaves_no_lock_behind(tmp_path: Path) -> None:
    process = KeptProcess(tmp_path, "worker", lambda: SLEEP)
    log_of(tmp_path, "worker").parent.mkdir()
    log_of(tmp_path, "worker").mkdir()  # the log cannot be opened
    assert not process.start()
    assert background.owner(lock_of(tmp_path, "worker")) is None


def test_a_supernode_that_has_died_is_not_connected(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "site.yaml").write_text("name: a\nserver: 127.0.0.1:1\n")
    supervisor = Supervisor(tmp_path)
    supernode = supervisor._supernode = KeptProcess(tmp_path, "supernode", lambda: SLEEP)
    assert supernode.start()
    try:
        note_link(tmp_path, "connected", 42)
        supervisor._note_link()
        assert read_link(tmp_path) == Link("connected", 42)
    finally:
        supernode.stop()
    supervisor._note_link()
    assert read_link(tmp_path) == Link("connecting", 42)


def test_a_site_lives_on_where_a_full_disk_does_not_take_how_its_link_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "site.yaml").write_text("name: a\nserver: 127.0.0.1:1\n")
    note_link(tmp_path, "connected", 42)
    supervisor = Supervisor(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(Path, "write_bytes", lambda *_: os.close(-1))  # an OSError
        supervisor._note_link()
    assert read_link(tmp_path) == Link("connected", 42)
    supervisor._note_link()
    assert read_link(tmp_path) == Link("connecting", 42)


def test_a_supernode_that_ended_is_started_anew_with_its_messenger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does over an order that is left over from a run that has ended."""
    monkeypatch.setattr(client.supervisor, "_OFFLINE_SECONDS", 0.0)
    (tmp_path / "run").mkdir()
    (tmp_path / "site.yaml").write_text("name: a\nserver: 127.0.0.1:1\n")
    commands = iter([[sys.executable, "-c", "import time; time.sleep(0.5)"], SLEEP])
    supervisor = Supervisor(tmp_path)
    supervisor._supernode = KeptProcess(tmp_path, "supernode", lambda: next(commands))
    supervisor._messenger = KeptProcess(tmp_path, "messenger", lambda: SLEEP)
    names = ("supernode", "messenger")
    try:
        supervisor._tend_link()
        first = {name: background.owner(lock_of(tmp_path, name)) for name in names}
        assert None not in first.values()
        deadline = time.monotonic() + 20
        second = first
        while None in second.values() or set(first.values()) & set(second.values()):
            assert time.monotonic() < deadline
            supervisor._tend_link()
            second = {name: background.owner(lock_of(tmp_path, name)) for name in names}
            time.sleep(0.05)
        supervisor._tend_link()
        assert {name: background.owner(lock_of(tmp_path, name)) for name in names} == second
    finally:
        supervisor._supernode.stop()
        supervisor._messenger.stop()


def test_nothing_starts_beside_a_supernode_whose_socket_cannot_be_bound(tmp_path: Path) -> None:
    """A messenger would hand its answers to whoever else listens there."""
    (tmp_path / "site.yaml").write_text("name: a\nserver: 127.0.0.1:1\n")
    supervisor = Supervisor(tmp_path)
    supervisor._supernode = KeptProcess(tmp_path, "supernode", lambda: SLEEP)
    supervisor._messenger = KeptProcess(tmp_path, "messenger", lambda: SLEEP)
    (tmp_path / "run/supernode.sock").mkdir()
    supervisor._tend_link()
    assert not supervisor._supernode.alive
    assert not supervisor._messenger.alive
    assert not supervisor._supernode.is_due()


def test_a_supernode_inherits_a_socket_that_is_bound_and_the_sites_alone(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("name: a\nserver: 127.0.0.1:1\n")
    supervisor = Supervisor(tmp_path)
    answering = "import socket, sys; socket.socket(fileno=int(sys.argv[1])).accept()[0].sendall(b'here')"
    supervisor._supernode = KeptProcess(
        tmp_path, "supernode", lambda: [sys.executable, "-c", answering, str(supervisor._descriptor)]
    )
    supervisor._messenger = KeptProcess(tmp_path, "messenger", lambda: SLEEP)
    try:
        supervisor._tend_link()
        with socket.socket(socket.AF_UNIX) as messenger, address_of(tmp_path / "run/supernode.sock") as address:
            messenger.settimeout(20)
            messenger.connect(address)
            assert messenger.recv(10) == b"here"
        assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    finally:
        supervisor._supernode.stop()
        supervisor._messenger.stop()
