"""Processes that a supervisor keeps going: it starts again what dies, the later the more often it died in a row.

They belong to one folder, with their locks in its `run/` and their output in its `logs/`. Knows nothing of what they
do.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import Popen

from core_training.foundation import background
from core_training.foundation.errors import FedloomError

_log = logging.getLogger(__name__)
_BACK_OFF_SECONDS = (0.2, 1.0, 2.0, 5.0, 10.0, 20.0)
_SETTLED_AFTER = 120.0


def lock_of(folder: Path, process: str) -> Path:
    """The lock that one of a folder's processes holds while it lives."""
    return folder / "run" / f"{process}.lock"


def log_of(folder: Path, process: str) -> Path:
    """The log file of one of a folder's processes."""
    return folder / "logs" / f"{process}.log"


class KeptProcess:
    """A process that is started again when it dies, the later the more often it died in a row."""

    def __init__(
        self, folder: Path, name: str, command: Callable[[], list[str]], environment: Mapping[str, str] | None = None
    ) -> None:
        self._lock = lock_of(folder, name)
        self._log = log_of(folder, name)
        self._name = name
        self._command = command
        self._environment = environment
        self._process: Popen[bytes] | None = None
        self._failures = 0
        self._started = 0.0
        self._due = 0.0

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def is_due(self) -> bool:
        """Whether the process does not run and the time to start it has come."""
        now = time.monotonic()
        if self.alive:
            return False
        if self._process is not None:
            _log.warning("%s ended with code %s", self._name, self._process.returncode)
            # After a long life this is a new fault, not the old one once more.
            if now > self._started + _SETTLED_AFTER:
                self._failures = 0
            self._process = None
            self._fail()
        return now >= self._due

    def postpone(self, seconds: float) -> None:
        """Put the next start off for so long at least."""
        self._due = max(self._due, time.monotonic() + seconds)

    def start(self) -> bool:
        """Start the process; one that a killed supervisor left behind ends first.

        Returns whether that worked; if not, the process is due again after a while.
        """
        try:
            background.stop(self._lock)
            self._process = background.start(self._command(), self._lock, self._log, self._environment)
        except (FedloomError, OSError) as error:
            _log.error("%s could not be started: %s", self._name, error)
            self._fail()
            return False
        self._started = time.monotonic()
        return True

    def _fail(self) -> None:
        self._failures += 1
        self._due = time.monotonic() + _BACK_OFF_SECONDS[min(self._failures, len(_BACK_OFF_SECONDS)) - 1]

    def stop(self) -> None:
        """End the process; it is due again at once."""
        background.stop(self._lock)
        if self._process is not None:
            self._process.wait()
        self._process = None
