"""The process that keeps a site's three others going: the worker, the SuperNode, the messenger between them.

It starts again what dies. `python -m client.supervisor SITE_FOLDER`. How the site stands with the server is in its
`client.link`.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
import time
from pathlib import Path

import core_training.foundation.environment  # noqa: F401 - for the processes that are started here
from client.link import note_link, read_link
from client.site_config import load_site_config
from client.worker_client import worker_command
from core_training.foundation import background
from core_training.foundation.careful_logging import log_to_stdout
from core_training.foundation.errors import FedloomError, RunError
from core_training.foundation.kept_processes import KeptProcess, lock_of
from core_training.foundation.stopping import exit_when_stopped
from security.certificates import AUTHORITY_CERTIFICATE
from security.private_files import make_private_folder, write_private_file
from security.private_sockets import listen

PROCESSES = ("site", "worker", "supernode", "messenger")
"""All processes of a running site; `site` is the supervisor."""

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.2
_OFFLINE_SECONDS = 5.0
"""Pause between the end of a killed SuperNode's session and the next one. The server, which looks for answers several
times a second, learns in between that the order under way is lost; else it would wait for it until its deadline."""


class Supervisor:
    """The three processes of one site."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config = load_site_config(folder)
        self._secret = folder / "run" / "runtime.secret"
        make_private_folder(folder / "run")
        # A new secret at each start shuts out a messenger that an earlier supervisor left behind.
        self._secret.unlink(missing_ok=True)
        write_private_file(self._secret, secrets.token_bytes(32))
        self._socket = folder / "run" / "supernode.sock"
        self._descriptor = -1
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
        """Tend the processes until a signal, then end them."""
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
        elif all(due):
            self._start_pair()

    def _start_pair(self) -> None:
        """Start SuperNode and messenger on a socket that is bound before either runs.

        It lies where nobody else may write, so no other account can take the SuperNode's place.
        """
        try:
            listener = listen(self._socket)
        except (FedloomError, OSError) as error:
            _log.error("%s cannot be made: %s", self._socket, error)
            self._supernode.postpone(_OFFLINE_SECONDS)
            return
        with listener:
            self._descriptor = listener.fileno()
            if self._supernode.start(inherited=[self._descriptor]):
                self._messenger.start()

    def _end_session(self) -> bool:
        """End what the server still has of a SuperNode that was killed. Returns whether there was anything."""
        background.stop(lock_of(self._folder, "supernode"))
        node_id = read_link(self._folder).node_id
        if node_id is None:
            return False
        from flower_transport.fleet_session import end_session  # loads Flower, which who only asks for a lock need not

        keys = self._folder / "keys"
        return end_session(str(self._config.server), self._folder / AUTHORITY_CERTIFICATE, keys / "node.key", node_id)

    def _note_link(self) -> None:
        """Note a dead SuperNode's link as not connected; a full disk, where it cannot be noted, ends no site."""
        if not self._supernode.alive and read_link(self._folder).state == "connected":
            try:
                note_link(self._folder, "connecting")
            except RunError as error:
                _log.error("how the link stands could not be noted: %s", error)

    def _supernode_command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "client.supernode", str(self._folder), str(self._descriptor)),
            *("--superlink", str(self._config.server)),
            *("--root-certificates", str(self._folder / AUTHORITY_CERTIFICATE)),
            *("--auth-supernode-private-key", str(self._folder / "keys" / "node.key")),
            *("--isolation", "process", "--superexec-auth-secret-file", str(self._secret)),
        ]

    def _messenger_command(self) -> list[str]:
        return [sys.executable, "-m", "client.messenger", str(self._socket), str(self._secret)]


def main() -> None:
    """Supervise the site whose folder is given on the command line."""
    log_to_stdout()
    exit_when_stopped()
    folder = Path(sys.argv[1]).absolute()
    os.chdir(folder)
    Supervisor(folder).run()


if __name__ == "__main__":
    main()
