"""The Flower ServerApp: lets the round loop carry out the run that Flower was asked to start.

It runs in a process of its own, which may end at any moment.
"""

from __future__ import annotations

import os
from pathlib import Path

from core_training.foundation.errors import FedloomError
from core_training.runs import events
from core_training.runs.run_folder import RunFolder
from flower_transport.apps import make_server_app
from flower_transport.grid import Grid
from server.federated_evaluation import evaluate_pending
from server.federation import FEDERATION_FOLDER, open_federation
from server.membership import Participants
from server.round_loop import run_federation
from server.run_progress import is_finished


def carry_out(grid: Grid, run_id: str) -> None:
    """Carry out, or go on with, a run of the federation that the environment names; this process holds its lock.

    Of a run that is finished, what is asked of its result is answered.
    """
    federation = open_federation(Path(os.environ[FEDERATION_FOLDER]))
    folder = federation.run_folder(run_id)
    try:
        if not is_finished(folder):
            run_federation(grid, folder, lambda: federation.sites_of(run_id), roster_of=federation.roster_of)
        participants = Participants(lambda: federation.sites_of(run_id), federation.roster_of)
        evaluate_pending(grid, RunFolder(folder), participants)
    except FedloomError as error:
        RunFolder(folder).event(events.Failed(reason=str(error)))
        federation.let_go(run_id)
        raise


app = make_server_app(carry_out)
