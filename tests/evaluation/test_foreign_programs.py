"""Programs of others end when they must, with all that they started, and reach nobody where the machine can."""

from __future__ import annotations

import socket
import sys
import time
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
