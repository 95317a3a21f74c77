"""The server as a whole, as its operator sees it: what runs, what stands still, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from typing import Any

from core_training.foundation.errors import RunError
from core_training.foundation.health import Health, health
from core_training.foundation.kept_processes import log_of
from security.certificates import AUTHORITY_CERTIFICATE, ends_soon, last_day
from server.deployment import run_states, running_processes, site_states
from server.federation import Federation
from server.run_progress import RunProgress

_STANDS = ("unattended", "waiting", "failed")
"""States of a run that does not go on by itself."""


@dataclass(frozen=True)
class ServerStatus:
    """The server's status; `sites` has the state of each admitted one, `certificates` the last days by file."""

    running: bool
    sites: dict[str, str]
    runs: list[RunProgress]
    certificates: dict[str, date]
    attention: list[str] = field(default_factory=list)

    @property
    def health(self) -> Health:
        return health(self.attention, running=self.running)

    def to_json(self) -> dict[str, Any]:
        return {
            "running": self.running,
            "sites": self.sites if self.running else {},
            "runs": [asdict(run) for run in self.runs],
            "certificates": {name: day.isoformat() for name, day in self.certificates.items()},
            "attention": self.attention,
        }


def server_status(federation: Federation) -> ServerStatus:
    """The status now, from the federation's folder and, where it runs, its SuperLink."""
    known: dict[str, str] | None = None
    attention: list[str] = []
    try:
        processes = running_processes(federation)
        running = any(processes.values())
        attention += _of_processes(federation, processes)
        known = site_states(federation)
    except RunError as error:
        running, start, stop = True, _command(federation, "start"), _command(federation, "stop")
        attention.append(f"the server runs and does not answer ({error}): {stop}, then {start}")
    runs = run_states(federation)
    days = {name: last_day(federation.keys / name) for name in ("server.crt", AUTHORITY_CERTIFICATE)}
    attention += _standing(runs)
    attention += [note for name in days if (note := ends_soon(federation.keys / name)) is not None]
    sites = {site.name: (known or {}).get(site.name, "unknown") for site in federation.sites()}
    return ServerStatus(running, sites, runs, days, attention)


def _of_processes(federation: Federation, processes: dict[str, int | None]) -> Iterator[str]:
    """What is to be said of the server's own processes, by their numbers."""
    start = _command(federation, "start")
    if not any(processes.values()):
        yield f"the server is not running; {start} starts it and goes on with its runs"
    elif processes["server"] is None:
        yield f"unattended: the supervisor has ended, and nothing starts again what dies; {start} takes over"
    else:
        for name in (name for name, number in processes.items() if number is None):
            log = log_of(federation.folder, name)
            yield f"the {name} does not run, and is started again; {log} says why it ended"


def _command(federation: Federation, name: str) -> str:
    return f"`fedloom server {name} --folder {federation.folder}`"


def _standing(runs: list[RunProgress]) -> Iterator[str]:
    """The runs that stand still, each with its reason."""
    for run in runs:
        if not run.finished and run.state in _STANDS:
            yield f"{run.run_id}: {run.note or run.state}"
