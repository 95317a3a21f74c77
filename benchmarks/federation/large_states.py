"""Large states: what a round of a whole model costs in time, memory and disk, over a real server with two sites.

102 million parameters in float32 (409 MB), all of them tuned; SuperLink, ServerApp and both sites on this machine, over
TLS, with next to nothing to train. Memory is each process's peak beyond what it held before the run, in states; the
ServerApp's beyond what it held when it began, so its imports are in it. The workers, which hold model, gradients and
moments, are told and not counted. Disk is what the folders of server and sites take beyond what they took
before the run, at most and afterwards.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from benchmarks.federation.deployed import deployed, moment, run_to_the_end
from benchmarks.federation.deployed_cost import few_records
from benchmarks.figure import Figure
from benchmarks.places import Places
from client.supervisor import PROCESSES
from core_training.foundation import background
from core_training.foundation.kept_processes import lock_of
from server.federation import Federation

SITES = 2
ROUNDS = 4
SHAPE = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_hidden_layers": 15}
WORK = (
    "tuning.mode=full",
    "privacy.codec=fp32",
    "data.eval_fraction=0.25",
    f"topology.rounds={ROUNDS}",
    "topology.local_steps=1",
    f"topology.eval_every={ROUNDS}",
    "training.learning_rate=1e-5",
    "training.max_length=64",
    "training.per_device_train_batch_size=1",
)


def measure(places: Places) -> Iterator[Figure]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, state = _make_model(places.model, folder / "model")
        records = few_records(places, folder, SITES)
        with deployed(folder, places, records, model, *WORK) as (federation, recipe):
            sites = [folder / name for name in records]
            with _Watch(federation, sites) as watch:
                run = run_to_the_end(federation, recipe, SITES)
            rounds = list(run.lines("round"))[1:]
            training = [max(site["seconds"] for site in event["sites"].values()) for event in rounds]
            seconds = [(moment(this) - moment(last)).total_seconds() for last, this in pairwise(run.lines("round"))]
            disk_after = watch.disk()
    yield Figure(
        name="large_state_round",
        meaning=f"seconds of a round of {SITES} sites with a state of {state / 1e6:.0f} MB",
        value=statistics.median(seconds),
        unit="s",
        target=15.0,
        details={"seconds": seconds, "training_seconds": training},
    )
    yield Figure(
        name="large_state_memory",
        meaning="the highest peak memory of a process in it",
        value=max(peak for role, peak in watch.peaks.items() if "worker" not in role) / state,
        unit="states",
        target=3.5,
        details={"states_by_process": {role: peak / state for role, peak in watch.peaks.items()}},
    )
    yield Figure(
        name="large_state_disk",
        meaning="the most disk that the server or a site takes while it goes on",
        value=max(watch.most_disk.values()) / state,
        unit="states",
        target=3.0,
        details={"states_by_folder": {place: taken / state for place, taken in watch.most_disk.items()}},
    )
    yield Figure(
        name="large_state_disk_after",
        meaning="the most disk that the server or a site takes afterwards",
        value=max(disk_after.values()) / state,
        unit="states",
        target=1.0,
        details={"states_by_folder": {place: taken / state for place, taken in disk_after.items()}},
    )


class _Watch:
    """The peaks of memory (bytes, by process) and disk (bytes, by folder) while the block runs."""

    def __init__(self, federation: Federation, sites: list[Path]) -> None:
        self.peaks: dict[str, float] = {}
        self.most_disk: dict[str, float] = {}
        self._federation = federation
        self._sites = sites
        self._before: dict[str, float] = {}
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._look_again_and_again)

    def __enter__(self) -> _Watch:
        self._disk_before = self._disk_now()
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def disk(self) -> dict[str, float]:
        """The bytes that each folder takes beyond what it took before the run."""
        return {place: taken - self._disk_before[place] for place, taken in self._disk_now().items()}

    def _look_again_and_again(self) -> None:
        while not self._ends.wait(0.05):
            self._look()

    def _look(self) -> None:
        for name, lock in self._locks():
            try:
                if (number := background.owner(lock)) is not None:
                    memory = _own_memory(number)
                    self._before.setdefault(name, memory)
                    self.peaks[name] = max(self.peaks.get(name, 0.0), memory - self._before[name])
            except FileNotFoundError:  # it ended
                continue
        for place, taken in self.disk().items():
            self.most_disk[place] = max(self.most_disk.get(place, 0.0), taken)

    def _locks(self) -> Iterator[tuple[str, Path]]:
        yield "superlink", self._federation.superlink_lock
        for run_id in self._federation.run_ids():
            yield "serverapp", self._federation.run_lock(run_id)
        for site in self._sites:
            for role in PROCESSES:
                yield f"{site.name} {role}", lock_of(site, role)

    def _disk_now(self) -> dict[str, float]:
        return {folder.name: _bytes_in(folder) for folder in (self._federation.folder, *self._sites)}


def _own_memory(process: int) -> float:
    """The bytes that a process alone holds in memory, files that it reads left out: those the system can drop."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * float(line.split()[1])
    return 0.0


def _bytes_in(folder: Path) -> float:
    taken = 0.0
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                taken += os.lstat(Path(root) / name).st_blocks * 512
            except FileNotFoundError:
                continue
    return taken


def _make_model(base: Path, folder: Path) -> tuple[Path, int]:
    """A wider model of the base model's kind, with random weights, and the bytes of its state."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, head_dim=64, **SHAPE))
    model.save_pretrained(folder)
    return folder, 4 * sum(parameter.numel() for parameter in model.parameters())
