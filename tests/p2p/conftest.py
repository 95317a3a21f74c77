"""Real federations on loopback: folders, keys, a signed roster, and nodes as processes."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core_training.runs.run_folder import RunFolder
from p2p.deployment import make_roster
from p2p.node_folder import init_node

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Federation:
    """Three nodes' folders under one founder, and the processes that run them."""

    def __init__(self, folder, names=("alpha", "beta", "gamma")):
        self.folder = folder
        self.names = names
        self.entries = {
            name: init_node(
                folder / name, name, f"127.0.0.1:{free_port()}", {"notes": ["notes.jsonl"]}, {"line": "line"}
            )
            for name in names
        }
        self.roster_file = folder / "roster.json"
        self.roster, self.founder = make_roster(list(self.entries.values()), folder / "founder", self.roster_file)
        self.processes = {}

    def start(self, name, *options):
        """Start a node's process; its standard error goes to `<name>.log`."""
        node = ["tests.p2p.linear_node", self.folder / name, self.roster_file, self.founder, *options]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen([sys.executable, "-m", *map(str, node)], stderr=log, cwd=ROOT)
        return self.processes[name]

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()

    def run_folder(self, name):
        runs = list((self.folder / name / "runs").glob("*"))
        return RunFolder(runs[0]) if runs else None

    def events(self, name, kind=None):
        folder = self.run_folder(name)
        return list(folder.lines(kind)) if folder else []

    def wait_for(self, name, kind, count=1, seconds=60):
        """Wait until a node has written so many events of a kind; returns them."""
        deadline = time.monotonic() + seconds
        while len(found := self.events(name, kind)) < count:
            assert time.monotonic() < deadline, f"{name} wrote no '{kind}': {self.events(name)} {self.log(name)}"
            time.sleep(0.05)
        return found

    def digests(self):
        """The state digests in the nodes' summaries."""
        return {(self.run_folder(name).summary() or {}).get("state_digest") for name in self.names}

    def finish(self, *names, seconds=60):
        """Wait until these nodes (all, if none is named) have ended well."""
        for name in names or self.names:
            assert self.processes[name].wait(seconds) == 0, self.log(name)


@pytest.fixture
def federation(tmp_path, request):
    """Three nodes, or those named by `indirect` parameters."""
    made = Federation(tmp_path, **({"names": request.param} if hasattr(request, "param") else {}))
    yield made
    for process in made.processes.values():
        process.kill()
        process.wait()
