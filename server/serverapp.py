"""The process in which a run's rounds go on: `python -m server.serverapp FEDERATION_FOLDER`, with a task's token."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

from core_training.foundation.careful_logging import log_to_stdout
from core_training.foundation.errors import FedloomError
from flower_transport.message_parts import PARTS_FOLDER
from flower_transport.server_task import carry_out
from server.app import app
from server.federation import open_federation
from server.operating import operator_of

TASK_TOKEN = "FEDLOOM_TASK_TOKEN"
"""Environment variable with the task's token: unlike a command line, others cannot read it."""


def main() -> int:
    """Carry out one task; returns 1 where it failed, after saying why."""
    log_to_stdout()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        federation = open_federation(Path(sys.argv[1]))
        carry_out(app, operator_of(federation), os.environ.pop(TASK_TOKEN), federation.flower_home / PARTS_FOLDER)
    except FedloomError as error:
        logging.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
