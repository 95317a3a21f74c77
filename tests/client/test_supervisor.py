"""The supervisor's care for one process, with a real one: starts that fail are made up for."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from client.supervisor import KeptProcess, lock_of, log_of
from core_training import background

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
