"""The process that has the wanted runs carried out: `python -m server.superexec FEDERATION_FOLDER`.

It stands where Flower has its own SuperExec. Each wanted run that nobody works on gets a ServerApp in a process of its
own, which holds the run's lock from its first moment on. So a run whose ServerApp was killed is taken up again; and one
whose ServerApps die over and over in the same round ends with a reason.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import core_training.foundation.environment  # noqa: F401 - before Flower is imported
from core_training.foundation import background
from core_training.foundation.careful_logging import log_to_stdout
from core_training.foundation.errors import FedloomError
from core_training.foundation.kept_processes import log_of
from core_training.foundation.stopping import exit_when_stopped
from core_training.runs import events
from core_training.runs.run_folder import RunFolder
from flower_transport.control import control
from flower_transport.operator import NoAnswer
from flower_transport.server_task import take_task
from server.evaluation_requests import give_up, pending
from server.federation import Federation, open_federation
from server.operating import operator_of
from server.run_progress import has_work
from server.serverapp import TASK_TOKEN

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.2
_DIALS_AGAIN_AFTER = 5.0
"""Pause after a SuperLink that did not answer: time for it to come up, and for the sites to dial again."""

_LOOKS_AGAIN_AFTER = 10.0
_STOPPED = (0, -signal.SIGTERM)
"""How a ServerApp ends that was stopped, as it is when its SuperLink is gone; that is no fault of the run's."""

_BACK_OFF_SECONDS = (0.0, 5.0)
"""Pauses after the first, the second fruitless attempt at a round. There is no third: the run ends."""


@dataclass(frozen=True)
class _Fruitless:
    """The attempts at a run that ended without a reason in one and the same round."""

    round: int
    attempts: int


class _NotWanted(Exception):
    """A run was let go while its process was being started: it is rewound, for one."""


class SuperExec:
    """The ServerApps of one federation."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._operator = operator_of(federation)
        self._apps: dict[str, Popen[bytes]] = {}
        self._fruitless: dict[str, _Fruitless] = {}
        self._not_before: dict[str, float] = {}

    def run(self) -> None:
        """Tend the wanted runs, for ever; what is wrong with one holds up no other."""
        while True:
            for run_id in sorted({*self._federation.wanted(), *self._apps}):
                try:
                    self._tend(run_id)
                except (FedloomError, OSError) as error:
                    _log.error("%s: %s", run_id, error)
                    self._pause(run_id, _LOOKS_AGAIN_AFTER)
            time.sleep(_POLL_SECONDS)

    def _tend(self, run_id: str) -> None:
        # In this order: whoever ends a run notes that it is not wanted, and lets go of its lock thereafter.
        if background.owner(self._federation.run_lock(run_id)) is not None:
            return
        if not self._federation.is_wanted(run_id):
            self._forget(run_id)
            return
        if time.monotonic() < self._not_before.get(run_id, 0.0):
            return
        app = self._apps.pop(run_id, None)
        if not has_work(self._federation.runs / run_id):
            self._federation.let_go(run_id)
        elif app is not None and (code := app.wait()) not in _STOPPED:
            self._note_attempt(run_id, f"its process ended with code {code}")
        else:
            self._start(run_id)

    def _start(self, run_id: str) -> None:
        try:
            self._apps[run_id] = self._start_app(run_id)
        except NoAnswer as error:
            _log.warning("%s waits: %s", run_id, error)
            self._pause(run_id, _DIALS_AGAIN_AFTER)
        except _NotWanted:
            _log.info("%s was let go meanwhile", run_id)
        except (FedloomError, OSError) as error:
            self._note_attempt(run_id, str(error))
        else:
            _log.info("%s is taken up", run_id)

    def _start_app(self, run_id: str) -> Popen[bytes]:
        folder = self._federation.folder
        with control(self._operator) as superlink:
            for left_over in superlink.active().get(run_id, []):
                superlink.stop(left_over)
            flower_run = superlink.start(run_id)
        task = take_task(self._operator, flower_run)
        if not self._federation.is_wanted(run_id):
            raise _NotWanted
        return background.start(
            [sys.executable, "-m", "server.serverapp", str(folder)],
            self._federation.run_lock(run_id),
            log_of(folder, "serverapp"),
            {TASK_TOKEN: task},
        )

    def _note_attempt(self, run_id: str, reason: str) -> None:
        """Count an attempt that came to nothing; the last one ends the run."""
        _log.warning("%s: %s", run_id, reason)
        folder = RunFolder(self._federation.runs / run_id)
        before, reached = self._fruitless.pop(run_id, None), folder.status().round
        attempts = before.attempts + 1 if before is not None and before.round == reached else 1
        if attempts <= len(_BACK_OFF_SECONDS):
            self._fruitless[run_id] = _Fruitless(reached, attempts)
            self._pause(run_id, _BACK_OFF_SECONDS[attempts - 1])
            return
        told = f"{reason}, {attempts} times after round {reached}; {log_of(self._federation.folder, 'serverapp')}"
        if folder.has_completed:
            for request in pending(folder.path):
                give_up(folder.path, request, f"{told} says why")
            self._federation.let_go(run_id)
            return
        folder.event(events.Failed(reason=f"{told} says why, and `fedloom server start` tries it again"))
        self._federation.let_go(run_id)

    def _forget(self, run_id: str) -> None:
        """Let a later start of the run, which has ended with a reason or was let go, begin afresh."""
        if app := self._apps.pop(run_id, None):
            app.wait()
        self._fruitless.pop(run_id, None)
        self._not_before.pop(run_id, None)

    def _pause(self, run_id: str, seconds: float) -> None:
        self._not_before[run_id] = time.monotonic() + seconds


def main() -> None:
    """Have the runs of the federation carried out whose folder is given on the command line."""
    log_to_stdout()
    exit_when_stopped()
    federation = open_federation(Path(sys.argv[1]))
    os.chdir(federation.folder)
    SuperExec(federation).run()


if __name__ == "__main__":
    main()
