"""The Flower ServerApp: lets the round loop carry out the run that Flower was asked to start.

Flower runs it in a process of its own, which may end at any moment; the lock says whether it still goes on.
"""

from __future__ import annotations

import os
from pathlib import Path

from core_training.foundation import background
from core_training.foundation.errors import FedloomError
from core_training.runs import events
from core_training.runs.run_folder import RunFolder
from flower_transport.apps import make_server_app
from flower_transport.grid import Grid
from server.federation import FEDERATION_FOLDER, open_federation
from server.round_loop import run_federation

PREDECESSOR_ENDS_WITHIN = 60.0


def carry_out(grid: Grid, run_id: str) -> None:
    """Carry out, or go on with, a run of the federation that the environment names."""
    federation = open_federation(Path(os.environ[FEDERATION_FOLDER]))
    folder = federation.run_folder(run_id)
    with background.claim(federation.run_lock(run_id), PREDECESSOR_ENDS_WITHIN):
        try:
            run_federation(grid, folder, federation.site_names, roster_of=federation.roster_of)
        except FedloomError as error:
            RunFolder(folder).event(events.Failed(reason=str(error)))
            raise


app = make_server_app(carry_out)
