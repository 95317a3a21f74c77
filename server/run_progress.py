"""What a run folder tells about its run: how far it is, and how well it does. Reads files; knows no processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core_training.recipe.reading import load_recipe
from core_training.runs.run_folder import RunFolder

_POLL_SECONDS = 0.5
_STARTS_WITHIN = 60.0
"""Seconds within which somebody works on a run that was submitted."""

_REPLACED_WITHIN = 15.0
"""Seconds within which somebody else works on a run when whoever did has ended."""


@dataclass(frozen=True)
class SiteFigures:
    """One site's share in the newest round it took part in. Losses are per token; masked ones are not known."""

    round: int
    loss: float | None
    eval_loss: float | None


@dataclass(frozen=True)
class RunProgress:
    """How a run stands. `round` is the newest one, void or not; `loss` is that of the newest one that counted.

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
    note: str | None = None


def read_progress(folder: Path) -> RunProgress:
    """How the run in `folder` stands, from its events and its summary."""
    run = RunFolder(folder)
    sites: dict[str, SiteFigures] = {}
    newest: dict[str, Any] = {}
    note: str | None = None
    quarantined = void = number = 0
    for event in run.events():
        number = event["round"] if event["event"] in ("round", "round_void") else number
        if event["event"] == "round":
            newest = event
            for name, figures in event["sites"].items():
                sites[name] = SiteFigures(event["round"], figures["loss"], figures["eval_loss"])
        quarantined += event["event"] == "quarantined"
        void += event["event"] == "round_void"
        note = note_of(event)
    summary = run.summary() or {}
    return RunProgress(
        run_id=folder.name,
        finished=bool(summary),
        round=number,
        rounds=load_recipe(folder / "recipe.yaml").topology.rounds or 0,
        loss=newest.get("loss"),
        eval_loss=summary.get("eval_loss", newest.get("eval_loss")),
        sites=sites,
        quarantined=quarantined,
        void_rounds=void,
        note=note,
    )


def is_finished(folder: Path) -> bool:
    """Whether the run came to its end, so that starting it again would not go on with anything."""
    return RunFolder(folder).summary() is not None


def follow(
    folder: Path, on_event: Callable[[dict[str, Any]], None], is_worked_on: Callable[[], bool] = lambda: True
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
        summary = run.summary()
        failed = False
        for event in run.new_events():
            on_event(event)
            failed = failed or event["event"] == "failed"
        if summary is not None or failed or abandoned:
            return summary or {}
        time.sleep(_POLL_SECONDS)


def note_of(event: dict[str, Any]) -> str | None:
    """What a person should know of an event; None for one that is as it should be."""
    match event["event"]:
        case "waiting":
            return f"waiting for {event['minimum']} sites, {len(event['sites'])} are there"
        case "site_failed":
            return f"{event['reason']}; the others go on without it"
        case "quarantined":
            return f"{event['site']} was set aside: {event['reason']}"
        case "late":
            return f"{event['site']} did not answer in time"
        case "round_void":
            return f"round {event['round']} is void and changed nothing: {event['reason']}"
        case "failed":
            return f"failed: {event['reason']}"
    return None
