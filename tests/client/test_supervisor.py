"""The supervisor's care for its processes, with real ones: starts that fail are made up for, the link is noted."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

import client.supervisor
from client.link import Link, note_link, read_link
from client.supervisor import Supervisor
from core_training.foundation import background
from core_training.foundation.kept_processes import KeptProcess, lock_of, log_of

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
        supervisor._tend_link()
        assert read_link(tmp_path) == Link("connected", 42)
    finally:
        supernode.stop()
    supernode.postpone(60)
    supervisor._tend_link()
    assert read_link(tmp_path) == Link("connecting", 42)


def test_a_site_lives_on_where_a_full_disk_does_not_take_how_its_link_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "site.yaml").write_text("name: a\nserver: 127.0.0.1:1\n")
    note_link(tmp_path, "connected", 42)
    supervisor = Supervisor(tmp_path)
    supervisor._supernode.postpone(60)
    with monkeypatch.context() as full:
        full.setattr(Path, "write_bytes", lambda *_: os.close(-1))  # an OSError
        supervisor._tend_link()
    assert read_link(tmp_path) == Link("connected", 42)
    supervisor._tend_link()
    assert read_link(tmp_path) == Link("connecting", 42)


def test_a_supernode_that_ended_is_started_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.supervisor, "_OFFLINE_SECONDS", 0.0)
    (tmp_path / "run").mkdir()
    (tmp_path / "site.yaml").write_text("name: a\nserver: 127.0.0.1:1\n")
    commands = iter([[sys.executable, "-c", "import time; time.sleep(0.5)"], SLEEP])
    supervisor = Supervisor(tmp_path)
    supervisor._supernode = KeptProcess(tmp_path, "supernode", lambda: next(commands))
    lock = lock_of(tmp_path, "supernode")
    try:
        supervisor._tend_link()
        first = second = background.owner(lock)
        assert first is not None
        deadline = time.monotonic() + 20
        while second in (None, first):
            assert time.monotonic() < deadline
            supervisor._tend_link()
            second = background.owner(lock)
            time.sleep(0.05)
        supervisor._tend_link()
        assert background.owner(lock) == second
    finally:
        supervisor._supernode.stop()
