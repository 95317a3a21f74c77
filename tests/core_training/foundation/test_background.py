"""Background processes and their locks: who runs is known, whatever is killed."""

import errno
import fcntl
import os
import signal
import sys
import threading
import time

import pytest

from core_training.foundation import background
from core_training.foundation.errors import InputError, RunError

SLEEP = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)",
]


def is_alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as stat:
            return stat.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_process_is_known_from_its_start_to_its_end(tmp_path):
    lock, log = tmp_path / "run" / "it.lock", tmp_path / "logs" / "it.log"
    assert background.owner(lock) is None

    process = background.start(SLEEP, lock, log, {"NAME": "value"})

    assert background.owner(lock) == process.pid
    wait_until(lambda: log.read_text() == "here\n")
    assert background.stop(lock)
    assert background.owner(lock) is None
    assert not background.stop(lock)


def test_a_second_start_is_refused_and_the_first_process_stays(tmp_path):
    lock = tmp_path / "it.lock"
    process = background.start(SLEEP, lock, tmp_path / "log")
    try:
        with pytest.raises(InputError, match=f"it is running already .process {process.pid}"):
            background.start(SLEEP, lock, tmp_path / "log")
        assert background.owner(lock) == process.pid
    finally:
        background.stop(lock)


def test_a_killed_process_leaves_no_trace_of_being_alive(tmp_path):
    lock = tmp_path / "it.lock"
    process = background.start(SLEEP, lock, tmp_path / "log")

    os.kill(process.pid, signal.SIGKILL)
    process.wait()

    assert background.owner(lock) is None
    background.start(SLEEP, lock, tmp_path / "log")
    background.stop(lock)


def test_a_process_whose_number_a_full_disk_does_not_take_is_ended_and_the_lock_is_free(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    lock = tmp_path / "it.lock"
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(RunError, match=r"it\.lock: cannot be written: No space left on device"):
            background.start(SLEEP, lock, tmp_path / "log")

    assert background.owner(lock) is None
    background.start(SLEEP, lock, tmp_path / "log")
    assert background.stop(lock)


def test_force_reaches_a_process_that_will_not_stop_and_its_children(tmp_path):
    lock, log = tmp_path / "it.lock", tmp_path / "log"
    background.start(STUBBORN, lock, log)
    wait_until(lambda: log.exists() and log.read_text().endswith("\n"))

    background.stop(lock, patience=0.3)

    assert background.owner(lock) is None
    wait_until(lambda: not is_alive(int(log.read_text())))


def test_a_claim_holds_while_its_block_runs(tmp_path):
    lock = tmp_path / "it.lock"
    with background.claim(lock):
        assert background.owner(lock) == os.getpid()
        with pytest.raises(InputError), background.claim(lock, patience=0.1):
            pass
    assert background.owner(lock) is None


def test_a_claim_that_waits_for_nobody_says_whether_it_holds(tmp_path):
    lock = tmp_path / "it.lock"
    with background.claim_if_free(lock) as held:
        assert held
        assert background.owner(lock) == os.getpid()
        began = time.monotonic()
        with background.claim_if_free(lock) as another:
            assert not another
        assert time.monotonic() - began < 0.2
        assert background.owner(lock) == os.getpid()
    assert background.owner(lock) is None


def test_whoever_looks_at_a_lock_does_not_keep_others_from_taking_it(tmp_path):
    lock = tmp_path / "it.lock"
    lock.touch()
    with open(lock) as glance:
        fcntl.flock(glance, fcntl.LOCK_SH)
        threading.Timer(0.3, fcntl.flock, [glance, fcntl.LOCK_UN]).start()
        with background.claim(lock):
            assert background.owner(lock) == os.getpid()


def test_a_holder_that_never_tells_its_number_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(background, "_NAMED_WITHIN", 0.2)
    lock = tmp_path / "it.lock"
    with open(lock, "w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(RunError, match=r"it\.lock is held by a process that has not written its number"):
            background.owner(lock)
