"""What a federation and a gossip group have in common: parties under one folder, their processes, a run at a time.

A world says which processes a component is, and gives the one line and the one disk on which things can go wrong.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from safetensors.numpy import load_file

from core_training.foundation import background
from core_training.runs.run_folder import RunFolder
from tests import tiny
from tests.faults.clocks import Clocks
from tests.faults.line import Line
from tests.faults.small_disk import SmallDisk, can_mount

ROOT = Path(__file__).parents[2]
VANISHES_WITHIN = 15.0
RECIPE = """
model: {name_or_path: tiny}
stage: pretrain
tuning: {mode: lora, lora: {r: 2}}
data: {train: notes}
training: {learning_rate: 1e-2, max_length: 32, per_device_train_batch_size: 4, logging_steps: 1}
topology: {kind: federated, rounds: 2, local_steps: 12, minimum_sites: 3, round_deadline: 30}
"""
MASKED = ("topology.minimum_sites=2", "privacy={secure_aggregation: {threshold: 0.55, minimum_sites: 2}}")
"""What a masked run's recipe says besides: two of three sites are enough."""


@dataclass
class Outcome:
    """What a run left: each party's result by digest, and how its rounds went."""

    results: dict[str, str]
    missing: list[str]
    """The parties without a result."""
    state: str | None
    counted_wrong: bool
    """Whether a round is missing from the run's account, or in it twice."""
    void: int
    late: int
    all_took_part: bool
    """Whether every round counted, with all parties in it."""
    ended: float
    """When the last party had its result, by the machine's own clock."""
    notes: list[str] = field(default_factory=list)


class Run(ABC):
    """A run that was begun. `name` is the party at which faults strike."""

    @abstractmethod
    def is_over(self) -> bool:
        """Whether every party that can have the result has it."""

    @abstractmethod
    def go_on(self) -> str | None:
        """Give the command by which a run goes on that stands still; returns it. None where it goes on by itself."""

    @abstractmethod
    def outcome(self) -> Outcome:
        """What the run, which is over, has left."""


class World(ABC):
    """Three parties with the tiny model in a new folder, of which the first is the one at which faults strike."""

    def __init__(self, parties: tuple[str, ...], disks: tuple[str, ...]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="faults-"))
        self.parties = parties
        self.model = tiny.make_model(self.folder / "model")
        self.recipe = self.folder / "recipe.yaml"
        self.recipe.write_text(RECIPE)
        self.data = {
            name: tiny.write_jsonl(self.folder / f"{name}.jsonl", tiny.texts(seed, 60))
            for seed, name in enumerate(parties)
        }
        self.clocks = Clocks(self.folder / "clocks")
        self._kept = {
            name: os.environ.get(name) for name in (*self.clocks.environment, "PYTHONPATH", "OMP_NUM_THREADS")
        }
        os.environ.update(self.clocks.environment, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        self.disks = {name: SmallDisk(self.folder / name) for name in disks} if can_mount() else {}
        self.lines: list[Line] = []

    @abstractmethod
    def begin(self, *, masked: bool) -> Run:
        """Begin a run in which nothing has gone wrong yet."""

    @abstractmethod
    def processes(self, component: str, run: Run) -> list[int]:
        """The processes that a component is now."""

    @abstractmethod
    def settle(self) -> list[str]:
        """Have all run that should, by the documented commands, which are returned."""

    @abstractmethod
    def stop(self) -> None:
        """Stop all parties, as the documents say."""

    @abstractmethod
    def _locks_in_use(self) -> dict[Path, int]:
        """The locks that are rightly held now, and by which process."""

    def leftovers(self) -> tuple[list[str], list[str]]:
        """Processes of this world that nobody tends, and locks that nobody should hold, after a moment's patience."""
        deadline = time.monotonic() + VANISHES_WITHIN
        while True:
            in_use = self._locks_in_use()
            orphans = [" ".join(one.cmdline()) for one in self._own_processes() if one.pid not in in_use.values()]
            held = [
                str(lock.relative_to(self.folder))
                for lock in self.folder.glob("*/run/*.lock")
                if lock not in in_use and background.owner(lock) is not None
            ]
            if not (orphans or held) or time.monotonic() > deadline:
                return orphans, held
            time.sleep(0.2)

    def keep(self, folder: Path) -> None:
        """Copy all files, for whoever looks into what was not well."""
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(shutil.Error):  # sockets cannot be copied
            shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("model", ".ballast"))

    def close(self) -> None:
        """End what is left by force, and remove the folder."""
        with suppress(Exception):
            self.stop()
        for process in self._own_processes():
            with suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
                process.wait(10)
        for line in self.lines:
            line.close()
        for disk in self.disks.values():
            disk.close()
        for name, value in self._kept.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        shutil.rmtree(self.folder, ignore_errors=True)

    def _own_processes(self) -> Iterator[psutil.Process]:
        """All processes with this world's folder on their command line, living ones."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                told = any(str(self.folder) in word for word in process.cmdline())
                if told and process.status() != psutil.STATUS_ZOMBIE:
                    yield process


def digest_of(run: Path) -> str | None:
    """The digest of the result's tensors in a run folder; None where there is no result."""
    weights = run / "adapter" / "adapter_model.safetensors"
    if not weights.exists():
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(weights).items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.tobytes())
    return digest.hexdigest()


def has(folder: Path, event: str, round_number: int | None = None, count: int = 1) -> bool:
    """Whether a run folder tells of so many events of a kind (and round)."""
    found = [
        line
        for line in _lines(folder)
        if line.get("event") == event and (round_number is None or line.get("round") == round_number)
    ]
    return len(found) >= count


def _lines(folder: Path) -> list[dict[str, Any]]:
    """A run's events, read anew only where there are more: who looks hundreds of times a second must take no part."""
    try:
        size = (folder / "events.jsonl").stat().st_size
    except OSError:
        return []
    if _read.get(folder, (-1, []))[0] != size:
        _read[folder] = size, list(RunFolder(folder).lines())
    return _read[folder][1]


_read: dict[Path, tuple[int, list[dict[str, Any]]]] = {}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
