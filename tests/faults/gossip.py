"""A gossip group: three nodes as processes, each reached by the others over a line that can break.

Faults strike at the first, `alpha`. Every run starts the nodes anew, and they end by themselves.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from pathlib import Path

from client.worker_client import worker_lock
from core_training.foundation import background
from core_training.runs.run_folder import RunFolder
from p2p.deployment import make_roster, node_lock, stop_node
from p2p.node_folder import init_node
from tests.faults.federation import agree_to_two
from tests.faults.line import Line
from tests.faults.world import MASKED, ROOT, Outcome, Run, World, digest_of, free_port, has

LINGER = 120
_STARTS = 4
"""How often a node is started in one run, at most."""


class GossipWorld(World):
    """The nodes' folders under one founder."""

    def __init__(self) -> None:
        super().__init__(("alpha", "beta", "gamma"), disks=("alpha",))
        entries = []
        for name in self.parties:
            port = free_port()
            line = Line(("127.0.0.1", port))
            self.lines.append(line)
            data, models = {"notes": [str(self.data[name])]}, {"tiny": str(self.model)}
            entries.append(init_node(self.folder / name, name, f"127.0.0.1:{port}", data, models, address=line.address))
            agree_to_two(self.folder / name)
        self.roster = self.folder / "roster.json"
        _, self.founder = make_roster(entries, self.folder / "founder", self.roster)
        self._numbers = itertools.count(1)

    def begin(self, *, masked: bool) -> GossipRun:
        return GossipRun(self, f"run{next(self._numbers)}", MASKED if masked else ())

    def processes(self, component: str, run: Run) -> list[int]:
        alpha = self.folder / "alpha"
        locks = {"node": [node_lock(alpha)], "worker": [worker_lock(alpha)]}
        locks["node machine"] = [*locks["node"], *locks["worker"]]
        return [process for lock in locks[component] if (process := background.owner(lock)) is not None]

    def settle(self) -> list[str]:
        return []

    def stop(self) -> None:
        for name in self.parties:
            stop_node(self.folder / name)
            background.stop(worker_lock(self.folder / name))

    def _locks_in_use(self) -> dict[Path, int]:
        """None: a node that has ended holds nothing."""
        return {}


class GossipRun(Run):
    """A run by its folder at alpha."""

    def __init__(self, world: GossipWorld, name: str, overrides: tuple[str, ...]) -> None:
        self._world = world
        self._name = name
        self._overrides = overrides
        self._folders: dict[str, Path] = {}
        self._starts = dict.fromkeys(world.parties, 0)
        self._nodes = {name: self._start(name) for name in world.parties}

    @property
    def at_alpha(self) -> Path:
        return self._folder_of("alpha")

    def is_over(self) -> bool:
        return all(node.poll() == 0 for node in self._nodes.values())

    def go_on(self) -> str | None:
        ended = [name for name, node in self._nodes.items() if node.poll() not in (None, 0)]
        for name in ended:
            if self._starts[name] == _STARTS:
                raise AssertionError(f"{name} ended {_STARTS} times, with code {self._nodes[name].returncode}")
            self._nodes[name] = self._start(name)
        return f"p2p start of {', '.join(ended)}" if ended else None

    def outcome(self) -> Outcome:
        folders = {name: self._folder_of(name) for name in self._world.parties}
        results = {name: digest for name, folder in folders.items() if (digest := digest_of(folder)) is not None}
        runs = {name: RunFolder(folder) for name, folder in folders.items()}
        summaries = {name: run.summary() or {} for name, run in runs.items()}
        wanted = runs["alpha"].recipe.topology.rounds
        epochs = {name: [event["round"] for event in run.lines("epoch")] for name, run in runs.items()}
        void = [event for run in runs.values() for event in run.lines("epoch_void")]
        adopted = [event for run in runs.values() for event in run.lines("adopted")]
        means = [event["contributors"] for run in runs.values() for event in run.lines("epoch")]
        return Outcome(
            results=results,
            missing=sorted(folders.keys() - results.keys()),
            state=summaries["beta"].get("state_digest"),
            counted_wrong=any(
                len(epochs[name]) != len(set(epochs[name])) or summaries[name].get("rounds_done") != wanted
                for name in folders
            )
            or len({summary.get("state_digest") for summary in summaries.values()}) != 1,
            void=len({event["round"] for event in void}),
            late=len({event["round"] for event in adopted}),
            all_took_part=all(sorted(mean) == sorted(folders) for mean in means)
            and not any(event["round"] > wanted for event in void),
            ended=max((folder / "summary.json").stat().st_mtime for folder in folders.values()),
            notes=[event["reason"] for run in runs.values() for event in run.lines("failed")],
        )

    def tells(self, event: str, round_number: int | None = None) -> bool:
        return has(self.at_alpha, event, round_number)

    def has_begun_to_commit(self, round_number: int) -> bool:
        name = f"epoch-{round_number:06d}"
        commits = self.at_alpha / "checkpoints"
        return (commits / name).exists() or (commits / f".{name}.partial").exists()

    def end(self) -> None:
        """End the nodes by force."""
        for node in self._nodes.values():
            node.kill()
            node.wait()

    def _folder_of(self, name: str) -> Path:
        """The run's folder at a node; one that is not there until the node has made it."""
        if name not in self._folders:
            runs = self._world.folder / name / "runs"
            if (found := next(runs.glob(f"{self._name}-*"), None)) is None:
                return runs / "none"
            self._folders[name] = found
        return self._folders[name]

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        self._starts[name] += 1
        folder = self._world.folder / name
        words = ["--folder", folder, "--roster", self._world.roster, "--founder", self._world.founder]
        words += ["--run-name", self._name, "--linger", LINGER, "--quiet", self._world.recipe]
        command = [sys.executable, "-m", "fedloom.cli", "p2p", "start", *map(str, words), *self._overrides]
        with (self._world.folder / f"{name}.log").open("ab") as log:
            log.write(f"--- {self._name} {time.ctime()}\n".encode())
            log.flush()
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT)
