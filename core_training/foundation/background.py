"""Processes that go on in the background, each under a lock file that shows whether it still lives.

The kernel gives a lock back when its process ends, however it ends: no stale file and no reused process number can
deceive the next start. Knows nothing of what the processes do.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from core_training.foundation.errors import InputError, RunError
from core_training.foundation.stopping import number_of, stopping_at_once

_POLL_SECONDS = 0.05
_A_GLANCE = 1.0
"""Seconds that a lock is waited for at least: `owner` holds one for a moment, to see whether anybody else does."""

_NAMED_WITHIN = 5.0
"""Seconds within which the holder of a lock has written its number there."""


def start(
    command: Sequence[str], lock: Path, log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start `command` detached from the terminal, its output appended to `log`; it holds `lock` while it lives.

    `environment` is added to this process's own. Raises InputError when the lock is held: the process runs already.
    Raises RunError when the disk has no room for its number; the process is ended then.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _take(lock)
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[descriptor],
                env={**os.environ, **(environment or {})},
            )
        try:
            _write_owner(lock, descriptor, process.pid)
        except RunError:  # nobody could find, and so stop, a process that its lock does not name
            _signal(-process.pid, signal.SIGKILL)
            process.wait()
            raise
    finally:
        os.close(descriptor)
    return process


@contextmanager
def claim(lock: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold `lock` in this process, after waiting up to `patience` seconds for another one to let go of it.

    Raises InputError when the other one still holds it then, and RunError when the disk has no room.
    """
    descriptor = _take(lock, patience)
    try:
        _write_owner(lock, descriptor, os.getpid())
        yield
    finally:
        os.close(descriptor)


@contextmanager
def claim_if_free(lock: Path) -> Iterator[bool]:
    """Hold `lock` in this process if nobody else does, by one try that waits for nobody; yields whether it is held.

    Whoever looks at the lock at this moment (`owner`) counts as one who holds it. Raises InputError and RunError as
    `claim`.
    """
    descriptor = _opened(lock)
    try:
        held = _try(descriptor)
        if held:
            _write_owner(lock, descriptor, os.getpid())
        yield held
    finally:
        os.close(descriptor)


def owner(lock: Path) -> int | None:
    """The number of the process that holds `lock`; None when nobody does.

    Raises RunError when the holder does not report its number: whoever was starting it was killed in between.
    """
    deadline = time.monotonic() + _NAMED_WITHIN
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            if number := os.read(descriptor, 20):
                return int(number)
            if time.monotonic() > deadline:
                raise RunError(
                    f"{lock} is held by a process that has not written its number there; "
                    f"find it with `fuser {lock}`, and end it"
                ) from None
        finally:
            os.close(descriptor)
        time.sleep(_POLL_SECONDS)


def stop(lock: Path, patience: float = 10.0) -> bool:
    """End the process that holds `lock`, by force after `patience` seconds. Returns whether there was one.

    Force reaches the whole process group that `start` made.
    """
    process = owner(lock)
    if process is None:
        return False
    _signal(process, signal.SIGTERM)
    if not _released(lock, process, patience):
        _signal(-process, signal.SIGKILL)
        _signal(process, signal.SIGKILL)
        _released(lock, process, patience)
    return True


def attend(process: subprocess.Popen[bytes]) -> signal.Signals | None:
    """Wait until `process` ends (None), or until somebody stops this one: the signal's number."""
    try:
        with stopping_at_once():
            process.wait()
    except KeyboardInterrupt as stop:
        return number_of(stop)
    return None


def search_path() -> str:
    """The PATH on which processes find the commands installed beside this interpreter."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _take(lock: Path, patience: float = 0.0) -> int:
    descriptor = _opened(lock)
    deadline = time.monotonic() + max(patience, _A_GLANCE)
    while not _try(descriptor):
        if time.monotonic() > deadline:
            holder = os.read(descriptor, 20).decode() or "another process"
            os.close(descriptor)
            raise InputError(f"{lock.stem} is running already (process {holder}); stop it first")
        time.sleep(_POLL_SECONDS)
    return descriptor


def _opened(lock: Path) -> int:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        return os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise InputError(f"{lock}: cannot be written: {error.strerror}; name a folder that can") from None


def _try(descriptor: int) -> bool:
    """Take the lock, emptied of the number of whoever had it before; whether it was free."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    os.ftruncate(descriptor, 0)
    return True


def _write_owner(lock: Path, descriptor: int, process: int) -> None:
    try:
        os.pwrite(descriptor, str(process).encode(), 0)
    except OSError as error:
        raise RunError(f"{lock}: cannot be written: {error.strerror}") from None


def _signal(process: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)


def _released(lock: Path, process: int, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while owner(lock) == process:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True
