"""What a real federation costs beside its training: time and processor time of a round, and what it takes at rest.

A SuperLink and 2, 4, 8 and 16 sites over TLS on this machine, each with SuperNode and worker, and next to
nothing to train. A round lasts from the end of the one before it to its own end; the slowest site's training is taken
away. Every process has one thread for arithmetic: the sites share the machine's cores.
"""

from __future__ import annotations

import gzip
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import islice, pairwise
from pathlib import Path

import psutil

from benchmarks.federation.deployed import deployed, moment, run_to_the_end
from benchmarks.figure import Figure
from benchmarks.places import Places
from client.supervisor import PROCESSES
from core_training.foundation import background
from core_training.foundation.kept_processes import lock_of
from core_training.runs.events import Event, Round
from server.federation import Federation

SIZES = (2, 4, 8, 16)
ROUNDS = 12
RECORDS = 8
WORK = (
    "data.eval_fraction=0.25",
    f"topology.rounds={ROUNDS}",
    "topology.local_steps=1",
    f"topology.eval_every={ROUNDS}",
    "training.per_device_train_batch_size=2",
)
SERVER = ("superlink", "superexec", "server", "serverapp")
SETTLES_WITHIN = 40.0
"""Seconds after a run in which all come to rest."""

AT_REST = 60.0


def measure(places: Places) -> Iterator[Figure]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for size in SIZES:
        with tempfile.TemporaryDirectory() as name:
            yield from _of_size(size, places, Path(name))


def _of_size(size: int, places: Places, folder: Path) -> Iterator[Figure]:
    records = few_records(places, folder, size)
    with deployed(folder, places, records, places.model, *WORK) as (federation, recipe):
        sites = [folder / name for name in records]
        before: dict[str, float] = {}
        after: dict[str, float] = {}

        def look(event: Event) -> None:
            if isinstance(event, Round) and event.round == 2:
                before.update(_cpu_seconds(federation, sites))
            elif isinstance(event, Round) and event.round == ROUNDS:
                after.update(_cpu_seconds(federation, sites))

        run = run_to_the_end(federation, recipe, size, on_event=look)
        rounds = list(run.lines("round"))[1:]
        beside = [
            (moment(this) - moment(last)).total_seconds() - max(site["seconds"] for site in this["sites"].values())
            for last, this in pairwise(rounds)
        ]
        each = {role: (after[role] - before[role]) / size / (ROUNDS - 2) for role in after}
        yield Figure(
            name=f"round_cost_{size}",
            meaning=f"seconds of a round of {size} sites beside the training",
            value=statistics.median(beside),
            unit="s",
            target={2: 1.0, 16: 2.0}.get(size, 2.0),
            details={"seconds": beside, "cpu_seconds_a_site_and_round": each},
        )
        yield Figure(
            name=f"superlink_cpu_{size}",
            meaning=f"the SuperLink's processor time a site and round, of {size} sites",
            value=each["superlink"],
            unit="s",
            target=0.05,
        )
        if size in (SIZES[0], SIZES[-1]):
            yield from _at_rest(size, federation, sites)


def _at_rest(size: int, federation: Federation, sites: list[Path]) -> Iterator[Figure]:
    time.sleep(SETTLES_WITHIN)
    before = _cpu_seconds(federation, sites)
    time.sleep(AT_REST)
    after = _cpu_seconds(federation, sites)
    shares = {role: 100 * (after[role] - before[role]) / AT_REST for role in after}
    of_server = sum(shares.get(role, 0.0) for role in SERVER)
    memory = _of_all(federation, sites, lambda process: process.memory_info().rss / 2**20)
    yield Figure(
        name=f"server_at_rest_{size}",
        meaning=f"a server of {size} sites at rest",
        value=of_server,
        unit="% of a core",
        target=2 + 0.1 * size,
        details={"by_process": {role: shares.get(role, 0.0) for role in SERVER}},
    )
    yield Figure(
        name=f"site_at_rest_{size}",
        meaning=f"one of {size} sites at rest",
        value=sum(shares[role] for role in PROCESSES) / size,
        unit="% of a core",
        target=1.0,
        details={"by_process": {role: shares[role] / size for role in PROCESSES}},
    )
    yield Figure(
        name=f"site_memory_at_rest_{size}",
        meaning="resident memory of a site at rest",
        value=sum(memory[role] for role in PROCESSES) / size,
        unit="MiB",
        target=700,
        details={"by_process": {role: memory[role] / size for role in PROCESSES}},
    )


def few_records(places: Places, folder: Path, size: int) -> dict[str, Path]:
    """As many sites' names and files of `RECORDS` records each."""
    records = {}
    for number, source in enumerate([*places.sites.values()] * size):
        if number == size:
            break
        name = f"site-{number:02}"
        records[name] = folder / f"{name}.jsonl"
        with gzip.open(source, "rt", encoding="utf-8") as lines:
            records[name].write_text("".join(islice(lines, number, number + RECORDS)), encoding="utf-8")
    return records


def _cpu_seconds(federation: Federation, sites: list[Path]) -> Mapping[str, float]:
    """The processor time of all processes by what they are, sites' together."""
    return _of_all(federation, sites, lambda process: sum(process.cpu_times()[:2]))


def _of_all(
    federation: Federation, sites: list[Path], figure: Callable[[psutil.Process], float]
) -> Mapping[str, float]:
    found: defaultdict[str, float] = defaultdict(float)
    locks = [(role, lock_of(folder, role)) for folder in sites for role in PROCESSES]
    locks += [(role, lock_of(federation.folder, role)) for role in SERVER[:-1]]
    locks += [("serverapp", federation.run_lock(run)) for run in federation.run_ids()]
    for role, lock in locks:
        if (number := background.owner(lock)) is not None:
            found[role] += figure(psutil.Process(number))
    return found
