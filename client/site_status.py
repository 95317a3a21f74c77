"""A site as a whole, as its operator sees it: its processes, its link to the server, its runs, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.deployment import running_processes
from client.link import read_link
from client.pinned_roster import pinned_roster
from client.server_probe import ServerProbe, probe_server
from client.site_config import load_site_config
from core_training.foundation.health import Health, health
from core_training.foundation.kept_processes import log_of
from core_training.runs.run_folder import RunFolder
from security.certificates import AUTHORITY_CERTIFICATE, ends_soon, last_day


@dataclass(frozen=True)
class SiteStatus:
    """The site's status.

    `link` is its standing with the server, `unattended` where the supervisor has ended and left others running, or
    `stopped`. `runs` has the newest event of each run, `server` a look at the server where the site runs.
    """

    name: str
    link: str
    detail: str
    processes: dict[str, int | None]
    roster: tuple[list[str], str] | None
    """The names in the pinned roster, and its digest."""
    runs: dict[str, dict[str, Any]]
    server: ServerProbe | None = None
    certificates: dict[str, str] = field(default_factory=dict)
    attention: list[str] = field(default_factory=list)

    @property
    def health(self) -> Health:
        return health(self.attention, running=self.link != "stopped")

    def to_json(self) -> dict[str, Any]:
        roster = None if self.roster is None else {"sites": self.roster[0], "digest": self.roster[1]}
        return {
            "name": self.name,
            "link": self.link,
            "processes": self.processes,
            "roster": roster,
            "runs": self.runs,
            "clock_ahead": None if self.server is None else self.server.clock_ahead,
            "certificates": self.certificates,
            "attention": self.attention,
        }


def site_status(folder: Path) -> SiteStatus:
    """The status now, from the site's folder and, where the site runs, a look at its server."""
    config, processes, link = load_site_config(folder), running_processes(folder), read_link(folder)
    state: str = link.state
    if processes["site"] is None:
        state = "unattended" if any(processes.values()) else "stopped"
    authority = folder / AUTHORITY_CERTIFICATE
    server = None
    if state != "stopped" and config.server is not None and authority.is_file():
        server = probe_server(config.server, authority)
    days = {AUTHORITY_CERTIFICATE: last_day(authority).isoformat()} if authority.is_file() else {}
    if server is not None and server.certificate_ends is not None:
        days["server.crt"] = server.certificate_ends.isoformat()
    pinned = pinned_roster(folder)
    return SiteStatus(
        name=config.name,
        link=state,
        detail=link.detail if state == "refused" else "",
        processes=processes,
        roster=None if pinned is None else (list(pinned.identities), pinned.digest),
        runs=_newest_events(folder),
        server=server,
        certificates=days,
        attention=list(_attention(folder, state, link.detail, processes, server)),
    )


def _attention(
    folder: Path, state: str, detail: str, processes: dict[str, int | None], server: ServerProbe | None
) -> Iterator[str]:
    start = f"`fedloom client start --folder {folder}`"
    if state == "stopped":
        yield f"the site is stopped; {start} starts it"
        return
    if state == "unattended":
        yield f"the site's supervisor has ended, so that nothing starts again what dies; {start} takes over"
    else:
        for process in (name for name, number in processes.items() if number is None):
            yield f"the {process} does not run, and is started again; {log_of(folder, process)} says why it ended"
    clock = server.clock_note if server is not None else None
    if state == "refused" and clock is None:
        yield f"the server does not take the site in ({detail}); its operator can see why, and the site keeps trying"
    if state == "connecting" and (server is None or not any(server.attention)):
        yield f"the site is not connected yet; {log_of(folder, 'supernode')} says what it waits for"
    if server is not None:
        yield from server.attention
    if (folder / AUTHORITY_CERTIFICATE).is_file() and (note := ends_soon(folder / AUTHORITY_CERTIFICATE)) is not None:
        yield note


def _newest_events(folder: Path) -> dict[str, dict[str, Any]]:
    runs = sorted((folder / "runs").glob("*/events.jsonl"))
    events = {path.parent.name: list(RunFolder(path.parent).lines()) for path in runs}
    return {run: of_run[-1] for run, of_run in events.items() if of_run}
