"""What a gossip node takes at rest: one that has joined its run and waits for its peers, with its worker beside it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks.federation.deployed_cost import few_records
from benchmarks.figure import Figure
from benchmarks.gossip.bytes import free_address
from benchmarks.places import Places
from client.worker_client import worker_lock
from core_training.foundation import background
from core_training.foundation.errors import RunError
from p2p.deployment import make_roster, node_lock, stop_node
from p2p.node_folder import init_node

MEMBERS = 3
SETTLES_WITHIN = 30.0
AT_REST = 60.0


def measure(places: Places) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = few_records(places, folder, MEMBERS)
        entries = [
            init_node(folder / node, node, free_address(), {"questions": [str(file)]}, {"base": str(places.model)})
            for node, file in records.items()
        ]
        node, roster = folder / next(iter(records)), folder / "roster.json"
        _, founder = make_roster(entries, folder / "founder", roster)
        recipe = folder / "recipe.yaml"
        wanted = places.recipe("data.train=questions", "model.name_or_path=base", "topology.minimum_sites=2")
        recipe.write_text(wanted.model_copy(update={"simulation": type(wanted.simulation)()}).to_yaml())
        command = [*(sys.executable, "-m", "fedloom.cli", "p2p", "start", str(recipe), "--folder", str(node))]
        subprocess.run([*command, "--roster", str(roster), "--founder", founder, "--detach"], check=True)
        try:
            time.sleep(SETTLES_WITHIN)
            yield from _at_rest(node)
        finally:
            stop_node(node)


def _at_rest(node: Path) -> Iterator[Figure]:
    numbers = {"node": background.owner(node_lock(node)), "worker": background.owner(worker_lock(node))}
    processes = {role: psutil.Process(number) for role, number in numbers.items() if number is not None}
    if processes.keys() != numbers.keys():
        raise RunError("node or worker ended before anything was measured")
    before = {role: sum(process.cpu_times()[:2]) for role, process in processes.items()}
    time.sleep(AT_REST)
    shares = {
        role: 100 * (sum(process.cpu_times()[:2]) - before[role]) / AT_REST for role, process in processes.items()
    }
    yield Figure(
        name="gossip_node_at_rest",
        meaning="a gossip node that waits for its peers, with its worker",
        value=sum(shares.values()),
        unit="% of a core",
        target=1.0,
        details={
            "by_process": shares,
            "mebibytes": {role: process.memory_info().rss / 2**20 for role, process in processes.items()},
        },
    )
