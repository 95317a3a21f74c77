"""The process that keeps a site's two others going: the SuperNode that speaks to the server, and the worker.

It starts again what dies. `python -m client.supervisor SITE_FOLDER`. How the site stands with the server is in its
`client.link`.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

from client.link import note_link, read_link
from client.site_config import load_site_config
from client.worker_client import worker_command
from core_training.foundation import background
from core_training.foundation.careful_logging import log_to_stdout
from core_training.foundation.environment import GIVES_MEMORY_BACK
from core_training.foundation.errors import RunError
from core_training.foundation.kept_processes import KeptProcess, lock_of
from core_training.foundation.stopping import exit_when_stopped
from security.certificates import AUTHORITY_CERTIFICATE
from security.private_files import make_private_folder

PROCESSES = ("site", "worker", "supernode")
"""All processes of a running site; `site` is the supervisor."""

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.2
_OFFLINE_SECONDS = 5.0
"""Pause between the end of a killed SuperNode's session and the next one: what it had in hand is lost, and the server
learns so in between. Else it would wait for an answer until its deadline."""


class Supervisor:
    """The two processes of one site."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config = load_site_config(folder)
        make_private_folder(folder / "run")
        settings = {"FLWR_HOME": str(folder / "flower"), "PYTHONUNBUFFERED": "1", **GIVES_MEMORY_BACK}
        self._worker = KeptProcess(folder, "worker", lambda: worker_command(folder))
        self._supernode = KeptProcess(folder, "supernode", lambda: supernode_command(folder), settings)

    def run(self) -> None:
        """Tend the processes until a signal, then end them."""
        try:
            while True:
                if self._worker.is_due():
                    self._worker.start()
                self._tend_link()
                time.sleep(_POLL_SECONDS)
        finally:
            for process in (self._supernode, self._worker):
                process.stop()

    def _tend_link(self) -> None:
        """Keep the SuperNode going, and note that a dead one is not connected."""
        if self._supernode.alive:
            return
        if read_link(self._folder).state == "connected":
            try:
                note_link(self._folder, "connecting")
            except RunError as error:  # a full disk ends no site
                _log.error("how the link stands could not be noted: %s", error)
        if not self._supernode.is_due():
            return
        if self._end_session():
            self._supernode.postpone(_OFFLINE_SECONDS)
        else:
            self._supernode.start()

    def _end_session(self) -> bool:
        """End what the server still has of a SuperNode that was killed. Returns whether there was anything."""
        background.stop(lock_of(self._folder, "supernode"))
        node_id = read_link(self._folder).node_id
        if node_id is None:
            return False
        from flower_transport.fleet_session import end_session  # loads Flower, which who only asks for a lock need not

        keys = self._folder / "keys"
        return end_session(str(self._config.server), self._folder / AUTHORITY_CERTIFICATE, keys / "node.key", node_id)


def supernode_command(folder: Path) -> list[str]:
    """The command line of the SuperNode."""
    return [sys.executable, "-m", "client.supernode", str(folder)]


def main() -> None:
    """Supervise the site whose folder is given on the command line."""
    log_to_stdout()
    exit_when_stopped()
    folder = Path(sys.argv[1]).absolute()
    os.chdir(folder)
    Supervisor(folder).run()


if __name__ == "__main__":
    main()
