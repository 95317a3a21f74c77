"""Secure aggregation over real processes with TLS, from the command line as docs/deploy.md says it.

Three sites train together; a guest is turned away, each time with words that say why. Processes are killed; runs go on,
and no mask hides two vectors.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from client.deployment import running_processes, stop_site
from client.supervisor import PROCESSES
from core_training.foundation.kept_processes import lock_of
from core_training.runs.run_folder import RunFolder
from fedloom.cli import app
from server.deployment import stop_server
from server.federation import Federation, open_federation
from server.run_progress import follow
from tests import tiny
from tests.server.processes import kill

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TOGETHER = ("north", "south", "west")
ROUNDS = 40
"""More than the others take until a site that was killed is back."""

RECIPE = """
model: {name_or_path: tiny}
stage: pretrain
tuning: {mode: lora, lora: {r: 2}}
data: {train: notes}
training: {learning_rate: 1e-2, max_length: 32, per_device_train_batch_size: 4}
topology: {kind: federated, rounds: 2, local_steps: 2, minimum_sites: 2, round_deadline: 60}
privacy: {secure_aggregation: {threshold: 0.55, minimum_sites: 2}}
"""


def fedloom(folder: Path, *words: str) -> str:
    """What a command says when it has done its work in the folder."""
    with chdir(folder):
        ran = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert ran.exit_code == 0, ran.output or ran.exception
    return ran.output


def start_fedloom(folder: Path, *words: str) -> "subprocess.Popen[str]":
    """A command that takes its time, in a process of its own."""
    environment = {**os.environ, "COLUMNS": "200"}
    command, pipe = [sys.executable, "-m", "fedloom.cli", *words], subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def wait_for(run: RunFolder, event: str, number: int, within: float = 90) -> None:
    """Until this event of a round has happened."""
    deadline = time.monotonic() + within
    while all(happened["round"] != number for happened in run.lines(event)):
        assert time.monotonic() < deadline, list(run.lines())
        time.sleep(0.02)


def reasons(run: RunFolder, site: str) -> list[str]:
    return [event["reason"] for event in run.lines("quarantined") if event["site"] == site]


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """A running federation: three sites that have pinned the newest roster, and `guest`, which has pinned none."""
    folder = tmp_path_factory.mktemp("secure")
    tiny.make_model(folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    sites = ("guest", *TOGETHER)
    path, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), str(ROOT)
    try:
        fedloom(folder, "server", "init", "--port", port)
        for seed, name in enumerate(sites):
            tiny.write_jsonl(folder / f"{name}.jsonl", tiny.texts(seed, 60))
            keys = ["--name", name, "--server", f"127.0.0.1:{port}", "--ca", "federation/keys/ca.crt"]
            own = ["--data", f"notes={name}.jsonl", "--model", "tiny=model"]
            fedloom(folder, "client", "init", "--folder", name, *keys, *own)
            # Of three sites two are to be enough, which each has to say for itself.
            demand(folder / name, minimum_sites=2)
        demand(folder / "guest", required=True)
        for name in sites[:-1]:
            fedloom(folder, "server", "admit", name, f"{name}/keys/node.pub")
        fedloom(folder, "server", "roster", "--out", "earlier.json")
        fedloom(folder, "server", "admit", sites[-1], f"{sites[-1]}/keys/node.pub")
        digest = fedloom(folder, "server", "roster").splitlines()[-1]
        for name in TOGETHER:
            assert digest in fedloom(folder, "client", "pin", "roster.json", "--folder", name)
        fedloom(folder, "server", "start")
        for name in sites:
            assert fedloom(folder, "client", "start", "--folder", name) == "The site is connected.\n"
        yield folder
    finally:
        for name in sites:
            stop_site(folder / name)
        stop_server(open_federation(folder / "federation"))
        os.environ.pop("PYTHONPATH")
        if path is not None:
            os.environ["PYTHONPATH"] = path


def demand(site: Path, **demands: float) -> None:
    """Edit the site's own terms."""
    document = yaml.safe_load((site / "site.yaml").read_text())
    document["secure_aggregation"].update(demands)
    (site / "site.yaml").write_text(yaml.safe_dump(document))


@pytest.fixture(scope="module")
def federation(walk: Path) -> Federation:
    return open_federation(walk / "federation")


def test_a_masked_run_ends_as_one_without_masks_though_a_worker_and_the_server_are_killed(
    walk: Path, federation: Federation
) -> None:
    """North's worker is killed in round 1, the server in round 2.

    The guest has pinned no roster at first, and then one that is not the others'; and it wants masks in any case.
    """
    submitted = fedloom(walk, "server", "submit", "recipe.yaml", "--json")
    run = RunFolder(federation.run_folder(json.loads(submitted)["run_id"]))
    with Records({site: walk / site / "runs" / run.run_id for site in TOGETHER}) as records:
        wait_for(run, "masks_set_up", 1)
        kill(lock_of(walk / "north", "worker"))
        fedloom(walk, "client", "stop", "--folder", "guest")
        fedloom(walk, "client", "pin", "earlier.json", "--folder", "guest")
        wait_for(run, "round", 1)
        while not (run.checkpoints / "round-000001").exists():
            time.sleep(0.02)
        kill(federation.run_lock(run.run_id))
        kill(federation.superlink_lock)
        guest = start_fedloom(walk, "client", "start", "--folder", "guest")
        assert f"Going on with {run.run_id}" in fedloom(walk, "server", "start")
        guest.communicate(timeout=60)
        summary = follow(run.path, lambda event: None)

    assert (summary["rounds"], summary["void_rounds"]) == (2, 0), list(run.lines())
    rounds_of = {name: site["rounds"] for name, site in summary["sites"].items()}
    assert rounds_of == dict.fromkeys(TOGETHER, 2), list(run.lines())
    records.check(rounds=2)
    unpinned, *_, misled = reasons(run, "guest")
    assert "site 'guest' has pinned no roster that names it" in unpinned
    assert "at the site `fedloom client pin roster.json`, and stop and start it" in unpinned
    assert "the site has pinned another roster than the others" in misled
    assert "at the site `fedloom client pin --replace roster.json`, and stop and start it" in misled

    submitted = fedloom(walk, "server", "submit", "recipe.yaml", "privacy={codec: ring16}", "--json")
    plain = RunFolder(federation.run_folder(json.loads(submitted)["run_id"]))
    assert follow(plain.path, lambda event: None)["state_digest"] == summary["state_digest"]
    (refused,) = reasons(plain, "guest")
    assert "this site takes part in no run without it (secure_aggregation.required" in refused


def test_a_site_that_is_killed_takes_part_again_and_no_mask_is_used_twice(walk: Path, federation: Federation) -> None:
    """All of south is killed in round 1. The guest demands more than the recipe offers."""
    fedloom(walk, "client", "stop", "--folder", "guest")
    demand(walk / "guest", minimum_sites=3)
    fedloom(walk, "client", "start", "--folder", "guest")
    known = set(federation.run_ids())
    waiting = start_fedloom(walk, "server", "submit", "recipe.yaml", f"topology.rounds={ROUNDS}", "--wait")
    while not (new := set(federation.run_ids()) - known):
        assert waiting.poll() is None
        time.sleep(0.1)
    run = RunFolder(federation.run_folder(new.pop()))
    with Records({site: walk / site / "runs" / run.run_id for site in TOGETHER}) as records:
        wait_for(run, "masks_set_up", 1)
        for process in PROCESSES:
            kill(lock_of(walk / "south", process))
        while any(running_processes(walk / "south").values()):
            time.sleep(0.02)
        fedloom(walk, "client", "start", "--folder", "south")
        said, _ = waiting.communicate(timeout=150)

    assert waiting.returncode == 0, said
    *_, last = run.lines("round")
    assert (last["round"], sorted(last["sites"])) == (ROUNDS, sorted(TOGETHER))
    records.check(rounds=ROUNDS)
    assert reasons(run, "guest") == ["minimum_sites 2: this site takes part from 3 up"]
    # Who waits is told all that is known, and that is no site's own loss.
    assert "guest was set aside: minimum_sites 2: this site takes part from 3 up" in said
    assert f"round {ROUNDS}/{ROUNDS} loss" in said
    assert "secure aggregation: " in said
    shown = fedloom(walk, "server", "status")
    told = {words: words in shown for words in (run.run_id, f"{ROUNDS}/{ROUNDS}, finished", "north, south, west")}
    assert all(told.values()), (shown, list(run.lines()))
    assert all(site[key] is None for site in last["sites"].values() for key in ("loss", "eval_loss", "weight"))


class Records:
    """Looks at sites' records of a run all the time: what is in them is what masks they used, and on what."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self._files = {site: folder / "secure-aggregation.json" for site, folder in folders.items()}
        self._masked: dict[tuple[str, int, int], set[str]] = defaultdict(set)
        self._slots: dict[tuple[str, int], set[tuple[int, int]]] = defaultdict(set)
        self._keys: dict[tuple[str, int], set[str]] = defaultdict(set)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Records":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def check(self, rounds: int) -> None:
        """One vector for a slot, one slot for a round, one set of keys for a batch; and no secret is left."""
        assert {number for _, number in self._slots} == set(range(1, rounds + 1))
        assert all(len(vectors) == 1 for vectors in self._masked.values()), self._masked
        assert all(len(slots) == 1 for slots in self._slots.values()), self._slots
        assert all(len(keys) == 1 for keys in self._keys.values()), self._keys
        for file in self._files.values():
            assert json.loads(file.read_text())["protocol"]["seeds"] == []

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            for site, file in self._files.items():
                if file.exists():
                    self._note(site, json.loads(file.read_text())["protocol"])

    def _note(self, site: str, record: dict[str, Any]) -> None:
        if record["keys"] is not None:
            self._keys[site, record["keys"]["batch"]["number"]].add(json.dumps(record["keys"]))
        if record["masked"] is not None:
            attempt = record["masked"]["attempt"]
            self._masked[site, attempt["batch"], attempt["slot"]].add(json.dumps(record["masked"]))
            self._slots[site, attempt["round"]].add((attempt["batch"], attempt["slot"]))
