"""The supervisor's care for its processes, with real ones: starts that fail are made up for, the link is noted."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

import client.supervisor
from client.supervisor import KeptProcess, Supervisor, lock_of, log_of, read_link
from core_training.foundation import background

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


SUPERNODE = """
import pathlib, sys, time
for number, said in enumerate(sys.argv[1:]):
    while not pathlib.Path(f"say-{number}").exists():
        time.sleep(0.02)
    print(said, flush=True)
time.sleep(60)
"""


def test_the_link_is_what_the_supernode_said_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "site.yaml").write_text("name: a\nserver: 127.0.0.1:1\n")
    failed, successful = "WARNING : Connection attempt failed, retrying in 2.00 seconds", "INFO : Connection successful"
    said = [failed, successful, "INFO : SuperNode ID: 42", failed, "x" * 100_000, successful]
    links = ["connecting", "connecting", "connected", "connecting", "connecting", "connected"]
    supervisor = Supervisor(tmp_path)
    supernode = KeptProcess(tmp_path, "supernode", lambda: [sys.executable, "-c", SUPERNODE, *said])
    supervisor._supernode = supernode
    assert supernode.start()
    try:
        for number, (words, state) in enumerate(zip(said, links, strict=True)):
            (tmp_path / f"say-{number}").touch()
            deadline = time.monotonic() + 20
            while not supernode.output().endswith(f"{words[-50:]}\n"):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            supervisor._note_link()
            assert read_link(tmp_path).state == state, words[:50]
        assert read_link(tmp_path).node_id == 42
    finally:
        supernode.stop()
    supervisor._note_link()
    assert read_link(tmp_path).state == "connecting"


def test_a_supernode_that_keeps_an_order_of_a_run_that_has_ended_is_started_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers would from then on be one order late."""
    monkeypatch.setattr(client.supervisor, "_OFFLINE_SECONDS", 0.0)
    (tmp_path / "run").mkdir()
    (tmp_path / "site.yaml").write_text("name: a\nserver: 127.0.0.1:1\n")
    said = "INFO : Run ID 7 is not in `RUNNING` status. Ignoring message 04da5fabcdaffde6."
    commands = iter([[sys.executable, "-c", f"import time; print('{said}', flush=True); time.sleep(60)"], SLEEP])
    supervisor = Supervisor(tmp_path)
    supervisor._supernode = KeptProcess(tmp_path, "supernode", lambda: next(commands))
    supervisor._messenger = KeptProcess(tmp_path, "messenger", lambda: SLEEP)
    try:
        supervisor._tend_link()
        first = {name: background.owner(lock_of(tmp_path, name)) for name in ("supernode", "messenger")}
        assert None not in first.values()
        deadline = time.monotonic() + 20
        while said not in supervisor._supernode.output():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        supervisor._tend_link()
        supervisor._tend_link()
        second = {name: background.owner(lock_of(tmp_path, name)) for name in first}
        assert None not in second.values()
        assert not set(first.values()) & set(second.values())
        supervisor._tend_link()
        assert {name: background.owner(lock_of(tmp_path, name)) for name in first} == second
    finally:
        supervisor._supernode.stop()
        supervisor._messenger.stop()
