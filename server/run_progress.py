"""A run's progress and losses, as its run folder reports them. Reads files; knows no processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core_training.recipe.reading import load_recipe
from core_training.runs.events import Event, Failed
from core_training.runs.run_folder import RunFolder
from core_training.runs.run_status import SiteFigures
from server.evaluation_requests import pending

_POLL_SECONDS = 0.5
_STARTS_WITHIN = 60.0
"""Seconds within which somebody works on a run that was submitted."""

_REPLACED_WITHIN = 15.0
"""Seconds within which somebody else works on a run when whoever did has ended."""


@dataclass(frozen=True)
class RunProgress:
    """A run's progress. `round` is the newest one, void or not; `loss` is that of the newest one that counted.

    `rounds_done` of its `rounds` counted, and `void_rounds` changed nothing. `state` is that of the run's status
    (`waiting`, `training`, `failed`, …), or `unattended` where nobody works on it.
    `note` is the newest event that a person should know of, if the run stands still.
    """

    run_id: str
    finished: bool
    round: int
    rounds: int
    loss: float | None = None
    eval_loss: float | None = None
    sites: dict[str, SiteFigures] = field(default_factory=dict)
    quarantined: int = 0
    void_rounds: int = 0
    rounds_done: int = 0
    note: str | None = None
    state: str = "starting"


def read_progress(folder: Path) -> RunProgress:
    """The progress of the run in `folder`, from its events and summary."""
    run = RunFolder(folder)
    status = run.status()
    newest, summary = status.newest, run.summary() or {}
    return RunProgress(
        run_id=folder.name,
        finished=run.has_completed,
        round=status.round,
        rounds=load_recipe(folder / "recipe.yaml").topology.rounds or 0,
        loss=newest.loss if newest else None,
        eval_loss=summary.get("eval_loss", newest.eval_loss if newest else None),
        sites=status.sites,
        quarantined=status.quarantined,
        void_rounds=status.void_rounds,
        rounds_done=status.rounds_done,
        note=status.note,
        state=summary.get("status", status.state),
    )


def is_finished(folder: Path) -> bool:
    """Whether the run came to its end, so that starting it again would not go on with anything."""
    return RunFolder(folder).has_completed


def has_work(folder: Path) -> bool:
    """Whether there is anything to carry out: rounds, or questions about the result."""
    return not is_finished(folder) or bool(pending(folder))


def follow(
    folder: Path, on_event: Callable[[Event], None], is_worked_on: Callable[[], bool] = lambda: True
) -> dict[str, Any]:
    """Report each event of a run as it happens, until the run is finished or stands still; returns its summary.

    The summary is empty when the run has failed, or when for a while nobody has worked on it.
    """
    run = RunFolder(folder)
    deadline = time.monotonic() + _STARTS_WITHIN
    while True:
        if is_worked_on():  # asked first: whoever ends has written the summary before
            deadline = time.monotonic() + _REPLACED_WITHIN
        abandoned = time.monotonic() > deadline
        summary = run.summary() if run.has_completed else None
        failed = False
        for event in run.new_events():
            on_event(event)
            failed = failed or isinstance(event, Failed)
        if summary is not None or failed or abandoned:
            return summary or {}
        time.sleep(_POLL_SECONDS)
