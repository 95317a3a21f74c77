"""The Flower ServerApp: finds the run that Flower was asked to start, and lets the round loop carry it out.

Flower runs it in a process of its own, which may end at any moment; the lock says whether it still goes on.
"""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from core_training.foundation import background
from core_training.foundation.errors import FedloomError
from core_training.runs.run_folder import RunFolder
from server.control import RUN_ID
from server.federation import FEDERATION_FOLDER, open_federation
from server.round_loop import run_federation

PREDECESSOR_ENDS_WITHIN = 60.0

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Carry out, or go on with, the run named in the run configuration."""
    federation = open_federation(Path(os.environ[FEDERATION_FOLDER]))
    run_id = str(context.run_config[RUN_ID])
    folder = federation.run_folder(run_id)
    with background.claim(federation.run_lock(run_id), PREDECESSOR_ENDS_WITHIN):
        try:
            run_federation(grid, folder, federation.site_names, roster_of=federation.roster_of)
        except FedloomError as error:
            RunFolder(folder).event("failed", reason=str(error))
            raise
