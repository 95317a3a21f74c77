"""Commands that a signal stops: each says how to go on, exits as a shell expects it, and goes on."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from signal import Signals

import pytest

from core_training.foundation import stopping
from core_training.foundation.errors import Interrupted, RunError
from core_training.foundation.stopping import raise_stop
from core_training.runs.run_folder import RunFolder
from fedloom.commands import server as command
from fedloom.foreground import attended
from p2p.deployment import _until_signal
from server.deployment import init_federation
from server.federation import Address
from tests.fedloom.conftest import Command

RecipeFile = Callable[..., Path]


@pytest.fixture(autouse=True)
def _nothing_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_last_heard", (None, -stopping.ECHO_SECONDS))


def kill_this_process(number: Signals, after: float = 0.2) -> None:
    threading.Timer(after, os.kill, (os.getpid(), number)).start()


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str], within: float = 120) -> None:
    deadline = time.monotonic() + within
    while not happened():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "number"), [("federated", Signals.SIGTERM), ("gossip", Signals.SIGUSR1)])
def test_a_simulation_that_is_stopped_says_its_round_and_goes_on_from_it(
    fedloom: Command,
    recipe_file: RecipeFile,
    site_files: list[Path],
    tmp_path: Path,
    environment: dict[str, str],
    kind: str,
    number: Signals,
) -> None:
    path = recipe_file(
        topology={"kind": kind, "rounds": 20, "local_steps": 1}, simulation={"sites": [str(one) for one in site_files]}
    )
    simulating = subprocess.Popen(
        [sys.executable, "-m", "fedloom.cli", "simulate", str(path)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    run = RunFolder(tmp_path / "run")
    wait_for(lambda: run.status().round >= 2, simulating)
    simulating.send_signal(number)
    out, err = simulating.communicate(timeout=60)
    assert simulating.returncode == 128 + number, err
    assert "Traceback" not in err
    assert out == ""
    said = err.strip().splitlines()[-1]
    done = int(said.split()[2])
    assert said == f"interrupted; round {done} is saved in {run.path}; --resume goes on from it"
    assert run.status().state == "interrupted"
    resumed = fedloom("simulate", path, "--resume", "--json")
    assert resumed.code == 0, resumed.err
    assert json.loads(resumed.out)["rounds"] == 20
    assert list(run.lines("round"))[-1]["round"] == 20


@pytest.mark.slow
def test_a_run_saves_when_its_terminal_is_gone(
    recipe_file: RecipeFile, tmp_path: Path, environment: dict[str, str]
) -> None:
    path = recipe_file(training={"max_steps": 4000, "save_steps": 5, "logging_steps": 1})
    near, far = pty.openpty()
    training = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY)\n"
         "from fedloom.cli import main; main()", "train", str(path)],
        env=environment, stdin=far, stdout=far, stderr=far, text=True, start_new_session=True,
    )  # fmt: skip
    os.close(far)

    def read() -> None:
        try:
            while os.read(near, 4096):
                pass
        except OSError:
            pass

    threading.Thread(target=read, daemon=True).start()
    wait_for(lambda: any(tmp_path.glob("run/checkpoints/step-*")), training)
    os.close(near)  # the connection drops: SIGHUP, and every word to the terminal is an error from now on
    assert training.wait(timeout=60) == 128 + signal.SIGHUP
    (interrupted,) = RunFolder(tmp_path / "run").lines("interrupted")
    assert (tmp_path / "run" / "checkpoints" / f"step-{interrupted['step']:08d}").is_dir()


@pytest.mark.slow
def test_a_group_saves_on_a_batch_systems_signal_and_its_launcher_says_so(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "saving.py").write_text(
        "import os, signal, sys, time\n"
        "def save(*_):\n"
        "    time.sleep(0.3)\n"
        "    open('saved', 'w').close()\n"
        "    sys.exit(138)\n"
        "signal.signal(signal.SIGUSR1, save)\n"
        "open('ready', 'w').close()\n"
        "time.sleep(60)\n"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", "import sys\nfrom core_training.distributed.launch import run_as_group\n"
         "sys.exit(run_as_group(1, 'saving', []))"],
        env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for((tmp_path / "ready").exists, launcher)
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.wait(timeout=60) == 128 + signal.SIGUSR1
    assert (tmp_path / "saved").exists()


def test_a_server_in_the_foreground_is_stopped_with_its_command() -> None:
    stopped: list[str] = []
    with subprocess.Popen(["sleep", "60"]) as served:
        kill_this_process(Signals.SIGTERM)
        with pytest.raises(Interrupted, match="`fedloom server start --folder f` goes on") as ended:
            attended(served, lambda: stopped.append("server"), "server", "--folder f")
        served.kill()
    assert (ended.value.exit_code, stopped) == (143, ["server"])


def test_a_server_in_the_foreground_that_ends_by_itself_has_failed() -> None:
    with subprocess.Popen(["false"]) as served, pytest.raises(RunError, match=r"ended by itself \(code 1\)"):
        attended(served, lambda: None, "server", "--folder f")


@pytest.mark.parametrize("number", stopping.STOPS)
def test_a_node_ends_in_order_with_the_signals_code(number: Signals) -> None:
    tidied: list[bool] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            tidied.append(True)

    kill_this_process(number)
    with pytest.raises(Interrupted, match="the same command goes on from it") as ended:
        asyncio.run(_until_signal(work(), lambda: None))  # type: ignore[arg-type]
    assert (ended.value.exit_code, tidied) == (128 + number, [True])


def test_who_follows_a_run_no_longer_is_told_that_it_goes_on(
    fedloom: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init_federation(tmp_path / "federation", Address(port=1), [])
    monkeypatch.setattr("server.deployment.submit_run", lambda *_: "notes-1")
    monkeypatch.setattr(command, "_follow", lambda *_, **__: raise_stop(Signals.SIGINT))
    outcome = fedloom("server", "submit", "any.yaml", "--wait", "--folder", tmp_path / "federation")
    assert outcome.code == 130
    assert "run notes-1 is not followed any more and goes on; `fedloom server status" in outcome.err
