"""The process that keeps a site's three others going: the worker, the SuperNode, the messenger between them.

It starts again what dies. `python -m client.supervisor SITE_FOLDER`. How the site stands with the server is in its
`client.link`.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import Popen

import core_training.foundation.environment  # noqa: F401 - for the processes that are started here
from client.link import note_link, read_link
from client.site_config import load_site_config
from client.worker_client import worker_command
from core_training.foundation import background
from core_training.foundation.errors import FedloomError
from security.private_files import write_private_file

PROCESSES = ("site", "worker", "supernode", "messenger")
"""All processes of a running site; `site` is the supervisor."""

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.2
_BACK_OFF_SECONDS = (0.2, 1.0, 2.0, 5.0, 10.0, 20.0)
_SETTLED_AFTER = 120.0
_OFFLINE_SECONDS = 5.0
"""Pause between the end of a killed SuperNode's session and the next one. The server, which looks for answers several
times a second, learns in between that the order under way is lost; else it would wait for it until its deadline."""


def lock_of(folder: Path, process: str) -> Path:
    """The lock that one of a site's processes holds while it lives."""
    return folder / "run" / f"{process}.lock"


def log_of(folder: Path, process: str) -> Path:
    """The log file of one of a site's processes."""
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


class Supervisor:
    """The three processes of one site."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config = load_site_config(folder)
        self._secret = folder / "run" / "runtime.secret"
        # A new secret at each start shuts out a messenger that an earlier supervisor left behind.
        self._secret.unlink(missing_ok=True)
        write_private_file(self._secret, secrets.token_bytes(32))
        self._port = 0
        flower = {
            "FEDLOOM_SITE_FOLDER": str(folder),
            "FLWR_HOME": str(folder / "flower"),
            "PATH": background.search_path(),
            "PYTHONUNBUFFERED": "1",
        }
        self._worker = KeptProcess(folder, "worker", lambda: worker_command(folder))
        self._supernode = KeptProcess(folder, "supernode", self._supernode_command, flower)
        self._messenger = KeptProcess(folder, "messenger", self._messenger_command, flower)

    def run(self) -> None:
        """Tend the processes until SIGTERM, then end them."""
        try:
            while True:
                if self._worker.is_due():
                    self._worker.start()
                self._tend_link()
                self._note_link()
                time.sleep(_POLL_SECONDS)
        finally:
            for process in (self._messenger, self._supernode, self._worker):
                process.stop()

    def _tend_link(self) -> None:
        """Keep SuperNode and messenger going as a pair: what either has in hand is lost when the other dies."""
        down = [process for process in (self._supernode, self._messenger) if not process.alive]
        if not down:
            return
        due = [process.is_due() for process in down]
        if len(down) == 1:
            self._messenger.stop()
            self._supernode.stop()
            self._end_session()
            self._supernode.postpone(_OFFLINE_SECONDS)
        elif all(due) and self._end_session():
            self._supernode.postpone(_OFFLINE_SECONDS)
        elif all(due) and self._supernode.start():
            self._messenger.start()

    def _end_session(self) -> bool:
        """End what the server still has of a SuperNode that was killed. Returns whether there was anything."""
        background.stop(lock_of(self._folder, "supernode"))
        node_id = read_link(self._folder).node_id
        if node_id is None:
            return False
        from flower_transport.fleet_session import end_session  # loads Flower, which who only asks for a lock need not

        keys = self._folder / "keys"
        return end_session(str(self._config.server), self._folder / "ca.crt", keys / "node.key", node_id)

    def _note_link(self) -> None:
        """Note a dead SuperNode's link as not connected."""
        if not self._supernode.alive and read_link(self._folder).state == "connected":
            note_link(self._folder, "connecting")

    def _supernode_command(self) -> list[str]:
        # Chosen anew each time: another process may have taken the earlier port meanwhile.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        return [
            *(sys.executable, "-m", "client.supernode", str(self._folder), "--superlink", str(self._config.server)),
            *("--root-certificates", str(self._folder / "ca.crt")),
            *("--auth-supernode-private-key", str(self._folder / "keys" / "node.key")),
            *("--isolation", "process", "--superexec-auth-secret-file", str(self._secret)),
            *("--host", "127.0.0.1", "--port", str(self._port)),
        ]

    def _messenger_command(self) -> list[str]:
        return [sys.executable, "-m", "client.messenger", f"127.0.0.1:{self._port}", str(self._secret)]


def main() -> None:
    """Supervise the site whose folder is given on the command line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    folder = Path(sys.argv[1]).absolute()
    os.chdir(folder)
    Supervisor(folder).run()


if __name__ == "__main__":
    main()
