"""The process that keeps a server's two others going: the SuperLink, and the SuperExec that starts the ServerApps.

It starts again what dies. `python -m server.supervisor FEDERATION_FOLDER`. What becomes of a ServerApp that dies is up
to the SuperExec.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from core_training.foundation import background
from core_training.foundation.careful_logging import log_to_stdout
from core_training.foundation.environment import GIVES_MEMORY_BACK
from core_training.foundation.kept_processes import KeptProcess
from core_training.foundation.stopping import exit_when_stopped
from flower_transport.credential import make_credential
from security.certificates import AUTHORITY_CERTIFICATE
from security.private_files import make_private_folder
from server.federation import FEDERATION_FOLDER, Federation, open_federation

_POLL_SECONDS = 0.2


class Supervisor:
    """The two processes of one server, for which it makes a new credential."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        make_private_folder(federation.operator_credential.parent)
        make_credential(federation.operator_credential)
        folder = federation.folder
        environment = {
            FEDERATION_FOLDER: str(folder),
            "FLWR_HOME": str(federation.flower_home),
            "PYTHONUNBUFFERED": "1",
            **GIVES_MEMORY_BACK,
        }
        self._superlink = KeptProcess(folder, "superlink", lambda: _superlink_command(federation), environment)
        self._superexec = KeptProcess(folder, "superexec", lambda: _superexec_command(federation), environment)

    def run(self) -> None:
        """Tend the processes until SIGTERM, then end them and the ServerApps."""
        try:
            while True:
                self._tend()
                time.sleep(_POLL_SECONDS)
        finally:
            self._superexec.stop()
            end_server_apps(self._federation)
            self._superlink.stop()

    def _tend(self) -> None:
        if self._superlink.is_due():
            end_server_apps(self._federation)  # Flower takes up no run of a SuperLink that is gone
            self._superlink.start()
        if self._superexec.is_due():
            self._superexec.start()


def end_server_apps(federation: Federation) -> None:
    """End the processes in which runs go on."""
    for run_id in federation.run_ids():
        background.stop(federation.run_lock(run_id))


def _superlink_command(federation: Federation) -> list[str]:
    keys = federation.keys
    return [
        *(sys.executable, "-m", "flower_transport.superlink"),
        *(str(federation.operator_credential), str(federation.flower_home)),
        *("--host", federation.address.host, "--port", str(federation.address.port)),
        *("--ssl-ca-certfile", str(keys / AUTHORITY_CERTIFICATE)),
        *("--ssl-certfile", str(keys / "server.crt"), "--ssl-keyfile", str(keys / "server.key")),
        *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        *("--isolation", "process"),  # the SuperExec is one of ours
    ]


def _superexec_command(federation: Federation) -> list[str]:
    return [sys.executable, "-m", "server.superexec", str(federation.folder)]


def main() -> None:
    """Supervise the server whose folder is given on the command line."""
    log_to_stdout()
    exit_when_stopped()
    federation = open_federation(Path(sys.argv[1]))
    os.chdir(federation.folder)
    Supervisor(federation).run()


if __name__ == "__main__":
    main()
