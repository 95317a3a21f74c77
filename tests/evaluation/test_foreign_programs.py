"""Programs of others end when they must, with all that they started, and reach nobody where the machine can."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from core_training.foundation.errors import RunError
from evaluation.bridges.foreign_programs import Program, fence, last_words, run, run_alone

# A process that starts another, and neither ends by itself.
_FOR_EVER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
time.sleep(float(sys.argv[1]))
"""


def python(code: str, folder: Path, seconds: float = 30.0, *arguments: str) -> Program:
    return Program("the program", [sys.executable, "-c", code, *arguments], folder, {"SAID": "so"}, seconds)


def child_of(log: Path) -> int:
    return int(log.read_text().split()[1])


def is_gone(process: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_program_has_its_folder_and_variables_and_gives_its_code(tmp_path: Path) -> None:
    code = "import os, pathlib, sys; pathlib.Path('here').write_text(os.environ['SAID']); sys.exit(3)"
    assert run(python(code, tmp_path), tmp_path / "log") == 3
    assert (tmp_path / "here").read_text() == "so"


def test_a_program_that_takes_too_long_is_ended_with_what_it_started(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(RunError, match="took longer than 2 seconds and was ended; it said: child"):
        run(python(_FOR_EVER, tmp_path, 2.0, "600"), log)
    assert is_gone(child_of(log))


def test_what_a_program_leaves_behind_is_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run(python(_FOR_EVER, tmp_path, 30.0, "0"), log) == 0
    assert is_gone(child_of(log))


# A process that leaves its session, and so the group that is ended with the program.
_AWAY = """
import os, subprocess, sys, time
code = "import os, time; open('away', 'w').write('x'); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
while not os.path.exists("away"):
    time.sleep(0.01)
time.sleep(float(sys.argv[1]))
"""


def left_in(folder: Path) -> list[psutil.Process]:
    """The processes whose folder this is, and that have not ended."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.parametrize("takes", ["0", "600"], ids=["ended", "too-long"])
def test_what_leaves_its_session_ends_with_a_program_alone(tmp_path: Path, takes: str) -> None:
    if "--pid" not in fence():
        pytest.skip("this machine makes no namespaces of processes")
    folder = tmp_path / "folder"
    folder.mkdir()
    try:
        assert run_alone(python(_AWAY, folder, 5.0, takes), tmp_path / "log") == 0
        assert takes == "0"
    except RunError:
        assert takes == "600"
    assert (folder / "away").exists()
    deadline = time.monotonic() + 10
    while left := left_in(folder):
        if time.monotonic() > deadline:
            for process in left:
                process.kill()
            pytest.fail("it lives on")
        time.sleep(0.05)


def test_a_program_alone_gives_its_code_and_its_signal(tmp_path: Path) -> None:
    assert run_alone(python("raise SystemExit(100)", tmp_path), tmp_path / "log") == 100
    assert run_alone(python("import ctypes; ctypes.string_at(0)", tmp_path), tmp_path / "log") not in (0, 100)


def test_a_program_finds_itself_among_the_processes_that_it_sees(tmp_path: Path) -> None:
    code = "import os; assert os.readlink('/proc/self') == str(os.getpid()), os.readlink('/proc/self')"
    if "--mount-proc" not in fence() and fence():
        pytest.skip("this machine lets nobody mount /proc")
    assert run_alone(python(code, tmp_path), tmp_path / "log") == 0


@pytest.mark.parametrize("works", [0, 1, 2, 3])
def test_the_fence_is_the_strongest_that_the_machine_makes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, works: int
) -> None:
    refused = ["none", "--mount-proc", "--pid", "--net"][works]
    (tmp_path / "unshare").write_text(f'#!/bin/sh\ncase "$*" in *{refused}*) exit 1;; esac\nexit 0\n')
    (tmp_path / "unshare").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    fence.cache_clear()
    try:
        made = fence()
    finally:
        fence.cache_clear()
    assert [part in made for part in ("--net", "--kill-child", "--mount-proc")] == [works < 3, works < 2, works < 1]


_TELL = "import json, os; print(json.dumps(dict(os.environ)))"


@pytest.mark.parametrize("runs", [run, run_alone], ids=["run", "alone"])
def test_a_program_is_given_variables_that_were_named_and_no_secrets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runs: Callable[[Program, Path], int]
) -> None:
    secrets = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "GITHUB_TOKEN", "PIP_INDEX_URL", "no_proxy",
               "SSH_AUTH_SOCK", "FEDLOOM_THING_KEY", "CUDA_TOKEN", "PYTHONSTARTUP", "LD_PRELOAD")  # fmt: skip
    for name in secrets:
        monkeypatch.setenv(name, "")
    needed = {"LC_TIME": "C", "TMPDIR": str(tmp_path), "HF_HOME": "/models", "CUDA_VISIBLE_DEVICES": "1",
              "OMP_NUM_THREADS": "2", "FEDLOOM_OFFLINE": "1"}  # fmt: skip
    for name, value in needed.items():
        monkeypatch.setenv(name, value)
    assert runs(python(_TELL, tmp_path), tmp_path / "log") == 0
    told = json.loads((tmp_path / "log").read_text())
    assert not set(secrets) & set(told)
    assert needed.items() <= told.items()
    assert (told["PATH"], told["HOME"], told["SAID"]) == (os.environ["PATH"], os.environ["HOME"], "so")


def test_a_program_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the program could not be started"):
        run(Program("the program", [str(tmp_path / "none")], tmp_path, {}, 1.0), tmp_path / "log")


def test_last_words_are_the_end_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("noise\n" * 1000 + "Error:\n\n  \x1b[31mwhat happened\n")
    assert last_words(tmp_path / "log").endswith("noise / Error: /  [31mwhat happened")
    (tmp_path / "log").write_text("")
    assert last_words(tmp_path / "log") == "nothing"


_CALL = """
import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=5)
"""
_CONNECT = """
import socket, sys
socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=5)
"""


def test_a_program_alone_reaches_nobody_through_what_heeds_proxies(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run_alone(python(_CALL, tmp_path, 30.0, "http://somewhere.invalid/"), log) != 0
    assert "Connection refused" in log.read_text() or "unreachable" in log.read_text()


def test_a_program_alone_reaches_nobody_at_all_where_the_machine_makes_namespaces(tmp_path: Path) -> None:
    if not fence():
        pytest.skip("this machine makes no network namespaces")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        assert run(python(_CONNECT, tmp_path, 30.0, port), tmp_path / "log") == 0
        assert run_alone(python(_CONNECT, tmp_path, 30.0, port), tmp_path / "log") != 0
