"""Every mode as it is deployed, its processes' listening sockets held to docs/security.md, and a stranger at each.

The table on that page is the only place that says who may listen where.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from client.deployment import init_site, start_site, stop_site
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from p2p.node_folder import init_node
from server.deployment import admit_site, init_federation, start_server, stop_server
from server.federation import Address
from tests.listening import Listener, assert_as_told, doors, listeners, needs_proc
from tests.server.test_deployment import free_port
from tests.strange_account import Attempts, attack, needs_root

pytestmark = [pytest.mark.slow, needs_proc]
ROOT = Path(__file__).parents[1]
ENDS_WITHIN = 20
UNTRIED = {"DeepSpeed group on GPUs"}
"""Modes of the table that the tests' machines cannot start."""


@dataclass(frozen=True)
class Deployment:
    """A mode that runs: its folder, what the table's names in capitals are here, and what is no other account's."""

    mode: str
    folder: Path
    places: dict[str, str]
    private: list[Path]
    started: list[psutil.Process] = field(default_factory=list)
    calls: Attempts = field(default_factory=Attempts)
    refusals: tuple[str, ...] = ()
    """How a port refuses whoever proves nothing, where it does so in words."""

    def private_files(self) -> list[Path]:
        return [path for folder in self.private for path in folder.rglob("*") if path.is_file()]

    def processes(self) -> list[psutil.Process]:
        """The processes that were started, and those that work in the folder or name it."""
        own = {os.getpid(), os.getppid()}
        return [*self.started, *(one for one in psutil.process_iter() if one.pid not in own and self._has(one))]

    def listeners(self) -> set[Listener]:
        """What they listen on, once they have all that the table tells of, or after a minute."""
        deadline = time.monotonic() + 60
        while True:
            seen = listeners(self.processes())
            missing = [d for d in doors(self.mode) if not any(d.admits(one, self.places) for one in seen)]
            if not missing or time.monotonic() > deadline:
                return seen
            time.sleep(0.5)

    def _has(self, process: psutil.Process) -> bool:
        try:
            return str(self.folder) in " ".join(process.cmdline()) or Path(process.cwd()).is_relative_to(self.folder)
        except psutil.Error:
            return False


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that other accounts can enter, unlike pytest's own: what they cannot read in it is closed by itself."""
    folder = tmp_path_factory.mktemp("l")
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def federation(place: Path, tiny_model: Path, site_files: list[Path]) -> Iterator[tuple[Deployment, Deployment]]:
    """A server, and a site that has connected to it."""
    made = init_federation(place / "server", Address(port=free_port()), [])
    address, authority = str(made.address), made.keys / "ca.crt"
    entry = init_site(
        place / "site", "north", address, {"notes": [str(site_files[0])]}, {"tiny": str(tiny_model)}, authority
    )
    try:
        start_server(made)
        admit_site(made, "north", entry)
        assert start_site(place / "site")[1].state == "connected"
        calls = [f"/v1/fleet/{call}" for call in ("register-node", "pull-messages", "push-messages", "get-run")]
        calls += [f"/v1/runtime/{call}" for call in ("acquire-task", "pull-messages", "push-messages", "get-nodes")]
        calls += [f"/v1/control/{call}" for call in ("register-node", "list-nodes", "start-run", "list-runs")]
        server, site = str(place / "server"), str(place / "site")
        yield (
            Deployment(
                "server",
                place / "server",
                {"HOST:PORT": address, "FEDERATION": server},
                [place / "server"],
                calls=Attempts(paths=calls),
                refusals=("401", "403"),
            ),
            Deployment("site", place / "site", {"SITE": site}, [place / "site"]),
        )
    finally:
        stop_site(place / "site")
        stop_server(made)


@pytest.fixture(scope="module")
def server(federation: tuple[Deployment, Deployment]) -> Deployment:
    return federation[0]


@pytest.fixture(scope="module")
def site(federation: tuple[Deployment, Deployment]) -> Deployment:
    return federation[1]


@pytest.fixture(scope="module")
def node(place: Path, tiny_model: Path, site_files: list[Path]) -> Iterator[Deployment]:
    """One of two gossip nodes, which waits for the other."""
    addresses = [f"127.0.0.1:{free_port()}" for _ in (0, 1)]
    folders = [place / "node", place / "other"]
    entries = [
        init_node(folder, folder.name, address, {"notes": [str(site_files[0])]}, {"tiny": str(tiny_model)})
        for folder, address in zip(folders, addresses, strict=True)
    ]
    roster = place / "roster.json"
    made = fedloom("p2p", "roster", *entries, "--out", roster, "--founder-key-folder", place / "founder", "--json")
    (place / "recipe.yaml").write_text(
        "{model: {name_or_path: tiny}, stage: sft, topology: {kind: gossip, rounds: 2, local_steps: 2}, "
        "data: {train: notes, columns: {prompt: question, completion: answer}}}"
    )
    where = ("--folder", place / "node", "--roster", roster, "--founder", json.loads(made)["founder"])
    fedloom("p2p", "start", *where, "--detach", "--json", place / "recipe.yaml")
    try:
        yield Deployment(
            "node",
            place / "node",
            {"HOST:PORT": addresses[0], "NODE": str(place / "node")},
            [place / "node", place / "founder"],
            calls=Attempts(
                methods=[f"/fedloom.p2p.Gossip/{call}" for call in ("Greet", "Publish", "Fetch", "Exchange")]
            ),
        )
    finally:
        fedloom("p2p", "stop", "--folder", place / "node")


@pytest.fixture(scope="module")
def group(place: Path, endless: Callable[..., Path]) -> Iterator[Deployment]:
    """A DeepSpeed group that trains."""
    pytest.importorskip("deepspeed")
    recipe = endless("group", training={"max_steps": 100_000, "logging_steps": 1}, deepspeed={"processes": 2})
    with running("train", recipe, lambda run: any(run.curve())) as process:
        (folder,) = {Path(one.environ()["FEDLOOM_GROUP_FOLDER"]) for one in process.children()}
        yield Deployment("DeepSpeed group", place / "group", {}, [folder], [process], Attempts(paths=["/"]))


@pytest.fixture(scope="module")
def ray(place: Path, site_files: list[Path], endless: Callable[..., Path]) -> Iterator[Deployment]:
    """A simulation on Ray, in its first rounds."""
    pytest.importorskip("ray")
    recipe = endless(
        "ray",
        topology={"kind": "federated", "rounds": 100_000, "local_steps": 1},
        simulation={"sites": [str(path) for path in site_files[:2]], "engine": "ray"},
    )
    methods = [
        *("NodeInfoGcsService/GetAllNodeInfo", "JobInfoGcsService/AddJob", "InternalKVGcsService/InternalKVKeys"),
        *("NodeManagerService/GetNodeStats", "NodeManagerService/RequestWorkerLease", "ObjectManagerService/Pull"),
        *("CoreWorkerService/PushTask", "CoreWorkerService/KillActor", "CoreWorkerService/Exit"),
    ]
    with running("simulate", recipe, lambda run: any(run.lines("round"))) as process:
        yield Deployment(
            "Ray simulation",
            place / "ray",
            {"RUN": str(place / "ray")},
            [place / "ray" / "ray"],
            [process],
            Attempts(paths=["/get_or_create_runtime_env"], methods=[f"/ray.rpc.{name}" for name in methods]),
            ("401", "UNAUTHENTICATED"),
        )


@pytest.fixture(scope="module")
def endless(place: Path, tiny_model: Path, site_files: list[Path]) -> Callable[..., Path]:
    """Recipes of runs that go on until they are stopped; `name` is that of the run's folder in `place`."""

    def make(name: str, **sections: object) -> Path:
        document = {
            "model": {"name_or_path": str(tiny_model)},
            "stage": "sft",
            "tuning": {"mode": "lora", "lora": {"r": 4, "lora_alpha": 8}},
            "data": {
                "train": [str(path) for path in site_files],
                "columns": {"prompt": "question", "completion": "answer"},
            },
            "training": {"per_device_train_batch_size": 2, "max_length": 64, "packing": False},
            "output": str(place / name),
        }
        recipe = place / f"{name}.yaml"
        recipe.write_text(Recipe.model_validate({**document, **sections}).to_yaml())
        return recipe

    return make


@contextmanager
def running(command: str, recipe: Path, is_under_way: Callable[[RunFolder], bool]) -> Iterator[psutil.Process]:
    """`fedloom COMMAND RECIPE`, from when its run is under way until the block ends and it is interrupted."""
    log = recipe.with_suffix(".log")
    words = [sys.executable, "-m", "fedloom.cli", command, str(recipe), "--quiet"]
    with log.open("w") as output:
        process = psutil.Popen(words, stdout=output, stderr=output, cwd=ROOT)
    try:
        deadline = time.monotonic() + 240
        while not is_under_way(RunFolder(recipe.with_suffix(""))):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield process
    finally:
        started = [process, *process.children(recursive=True)]
        process.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs(started, timeout=ENDS_WITHIN)
        for one in alive:
            one.kill()


def fedloom(*words: object) -> str:
    command = [sys.executable, "-m", "fedloom.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


MODES = {"server": "server", "site": "site", "node": "node", "DeepSpeed group": "group", "Ray simulation": "ray"}


@pytest.fixture(scope="module", params=MODES.values(), ids=MODES.keys())
def deployment(request: pytest.FixtureRequest) -> Deployment:
    return request.getfixturevalue(request.param)


def test_every_mode_of_the_table_is_tried() -> None:
    assert {door.mode for door in doors()} == MODES.keys() | UNTRIED


def test_what_listens_is_what_the_page_tells(deployment: Deployment) -> None:
    assert_as_told(deployment.mode, deployment.listeners(), deployment.places)


@needs_root
def test_another_account_of_the_machine_gets_nothing(deployment: Deployment) -> None:
    """It reads no private file and no process's memory, connects to no unix socket, and no port grants it a call."""
    seen = deployment.listeners()
    processes = deployment.processes()
    inside = [f"/proc/{one.pid}/{name}" for one in processes for name in ("environ", "mem", "maps")]
    calls = Attempts(
        files=[*map(str, deployment.private_files()), *inside],
        sockets=[one.address.removeprefix("unix:") for one in seen if one.address.startswith("unix:")],
        addresses=[one.address.removeprefix("tcp:") for one in seen if one.address.startswith("tcp:")],
        paths=deployment.calls.paths,
        methods=deployment.calls.methods,
    )
    haul = attack(calls)
    assert len(calls.files) > len(inside)
    assert haul.taken == []
    assert all(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes)
    # Not for being misunderstood: each port has refused a call for want of the proof.
    refused = {address for address in calls.addresses for said in haul.said_at(address) if said in deployment.refusals}
    assert refused == set(calls.addresses) or not deployment.refusals, haul.answers


def test_no_secret_is_on_a_command_line(deployment: Deployment) -> None:
    """Which every account of the machine can read."""
    secrets = [path.read_bytes() for path in deployment.private_files() if path.stat().st_mode & 0o077 == 0]
    words = [word.encode() for one in deployment.processes() for word in one.cmdline()]
    assert [word for word in words if len(word) >= 16 and any(word in secret for secret in secrets)] == []
