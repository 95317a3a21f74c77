"""A deployed federation: a server and three sites, the first of them, `north`, behind a line that can break."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from client import worker_socket
from client.deployment import init_site, running_processes, start_site, stop_site
from client.pinned_roster import pin_roster
from client.site_config import SITE_FILE
from client.supervisor import PROCESSES
from core_training.foundation import background
from core_training.foundation.kept_processes import lock_of
from core_training.runs.run_folder import RunFolder
from server.deployment import (
    admit_site,
    init_federation,
    is_worked_on,
    site_states,
    start_server,
    stop_server,
    submit_run,
)
from server.federation import Address, Federation
from tests.faults.line import Line
from tests.faults.world import MASKED, Outcome, Run, World, digest_of, free_port, has

SERVER = ("server", "superexec", "serverapp", "superlink")
"""The server's processes, the supervisor first: what it would start again must not be killed before it."""

_HEALTHY_WITHIN = 120.0
_DOWN_FOR = 5.0
"""Seconds after which somebody starts a site again of which nothing is left, while a run waits for it."""


class FederatedWorld(World):
    """Its processes run on from one run to the next, as a federation's do."""

    def __init__(self) -> None:
        super().__init__(("north", "south", "west"), disks=("federation", "north"))
        self.federation = init_federation(self.folder / "federation", Address(port=free_port()), [])
        self.sites = [self.folder / name for name in self.parties]
        line = Line((self.federation.address.host, self.federation.address.port))
        self.lines.append(line)
        start_server(self.federation)
        for site in self.sites:
            server = line.address if site.name == "north" else str(self.federation.address)
            init_site(
                site,
                name=site.name,
                server=server,
                data={"notes": [str(self.data[site.name])]},
                models={"tiny": str(self.model)},
                authority=self.federation.keys / "ca.crt",
            )
            agree_to_two(site)
            admit_site(self.federation, site.name, site / "keys" / "node.pub")
        self.federation.hand_out_roster(self.folder / "roster.json")
        for site in self.sites:
            pin_roster(site, self.folder / "roster.json")
        self.settle()

    def begin(self, *, masked: bool) -> FederatedRun:
        return FederatedRun(self, submit_run(self.federation, self.recipe, list(MASKED) if masked else []))

    def processes(self, component: str, run: Run) -> list[int]:
        assert isinstance(run, FederatedRun)
        locks = {
            "server": self.federation.server_lock,
            "superexec": self.federation.superexec_lock,
            "serverapp": self.federation.run_lock(run.run_id),
            "superlink": self.federation.superlink_lock,
            **{name: lock_of(self.folder / "north", name) for name in PROCESSES},
        }
        names = {"server machine": SERVER, "site machine": PROCESSES}.get(component, (component,))
        return [process for name in names if (process := background.owner(locks[name])) is not None]

    def settle(self) -> list[str]:
        """Wait until all processes run and the server has all sites; start what nobody starts again."""
        given = self.start_supervisors()
        deadline = time.monotonic() + _HEALTHY_WITHIN
        while not self._is_healthy():
            if time.monotonic() > deadline:
                raise AssertionError(f"the federation does not come up: {self._locks_in_use()}")
            time.sleep(0.3)
        return given

    def start_supervisors(self) -> list[str]:
        """Start the server and the sites whose supervisors are gone."""
        given = []
        if background.owner(self.federation.server_lock) is None:
            start_server(self.federation)
            given.append("server start")
        for site in self.sites:
            if background.owner(lock_of(site, "site")) is None:
                start_site(site)
                given.append("client start")
        return given

    def stop(self) -> None:
        for site in self.sites:
            stop_site(site)
        stop_server(self.federation)

    def _is_healthy(self) -> bool:
        if None in self._kept_locks().values():
            return False
        with suppress(Exception):  # a worker, or a SuperLink, that is coming up answers nobody
            for site in self.sites:
                worker_socket.connect(site).close()
            return set((site_states(self.federation) or {"": "away"}).values()) == {"online"}
        return False

    def _kept_locks(self) -> dict[Path, int | None]:
        server = (self.federation.server_lock, self.federation.superexec_lock, self.federation.superlink_lock)
        locks = [*server, *(lock_of(site, process) for site in self.sites for process in PROCESSES)]
        return {lock: background.owner(lock) for lock in locks}

    def _locks_in_use(self) -> dict[Path, int]:
        supervisors = (self.federation.server_lock, *(lock_of(site, "site") for site in self.sites))
        tended = {lock.parent for lock in supervisors if background.owner(lock) is not None}
        return {
            lock: process
            for lock, process in self._kept_locks().items()
            if process is not None and lock.parent in tended
        }


class FederatedRun(Run):
    """A run by its folders at the server and at north."""

    def __init__(self, world: FederatedWorld, run_id: str) -> None:
        self._world = world
        self._federation: Federation = world.federation
        self.run_id = run_id
        self.folder = self._federation.runs / run_id
        self.at_site = world.folder / "north" / "runs" / run_id
        self._down_since: float | None = None

    def is_over(self) -> bool:
        return RunFolder(self.folder).has_completed and background.owner(self._federation.run_lock(self.run_id)) is None

    def go_on(self) -> str | None:
        if self._stands_still():
            given = self._world.start_supervisors()
            if "server start" not in given:
                start_server(self._federation)
                given.append("server start")
            return ", ".join(given)
        down = any(not any(running_processes(site).values()) for site in self._world.sites)
        self._down_since = (self._down_since or time.monotonic()) if down else None
        if self._down_since is not None and time.monotonic() > self._down_since + _DOWN_FOR:
            return ", ".join(self._world.start_supervisors())
        return None

    def _stands_still(self) -> bool:
        """Whether the run has failed, or nobody works on it."""
        if not is_worked_on(self._federation, self.run_id):
            time.sleep(1)  # whoever ends a run writes why, and lets go of it
            return not (self.is_over() or is_worked_on(self._federation, self.run_id))
        return False

    def outcome(self) -> Outcome:
        run = RunFolder(self.folder)
        summary = run.summary() or {}
        places = {"server": self.folder, **{site.name: site / "runs" / self.run_id for site in self._world.sites}}
        results = {name: digest for name, place in places.items() if (digest := digest_of(place)) is not None}
        counted = [row["round"] for row in run.curve() if "loss" in row]
        wanted = run.recipe.topology.rounds
        taking_part = {event["round"]: len(event["sites"]) for event in run.lines("round")}
        void = len(list(run.lines("round_void")))
        return Outcome(
            results=results,
            missing=sorted(places.keys() - results.keys()),
            state=summary.get("state_digest"),
            counted_wrong=not (len(counted) == len(set(counted)) == summary.get("rounds_done") == wanted),
            void=void + len(list(run.lines("void"))),
            late=len(list(run.lines("late"))),
            all_took_part=not void and set(taking_part.values()) == {len(self._world.sites)},
            ended=(self.folder / "summary.json").stat().st_mtime,
            notes=[event["reason"] for event in run.lines("failed")],
        )

    def at_server(self, event: str, round_number: int | None = None, count: int = 1) -> bool:
        return has(self.folder, event, round_number, count)

    def at_north(self, event: str, round_number: int) -> bool:
        return has(self.at_site, event, round_number)

    def has_committed(self, round_number: int) -> bool:
        return (self.folder / "checkpoints" / f"round-{round_number:06d}").exists()

    def masks(self) -> dict[str, Any]:
        """What north has on record of its masks."""
        with suppress(OSError, ValueError):
            protocol: dict[str, Any] = json.loads((self.at_site / "secure-aggregation.json").read_text())["protocol"]
            return protocol
        return {}


def agree_to_two(site: Path) -> None:
    """Have the site say that two of three are enough, which a masked run of three can only then do with."""
    document = yaml.safe_load((site / SITE_FILE).read_text())
    document["secure_aggregation"] = {**document.get("secure_aggregation", {}), "minimum_sites": 2}
    (site / SITE_FILE).write_text(yaml.safe_dump(document))
