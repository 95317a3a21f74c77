"""A group's processes over gloo, and a stranger who connects first."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow

PROCESS = """
import json, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from core_training.distributed import proven_gloo
from core_training.foundation.errors import RunError

proven_gloo._PROVEN_WITHIN = timedelta(seconds=3)
rank, folder, groups = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
sums = []
try:  # the first group is one that a stranger can break into, too
    dist.init_process_group(proven_gloo.NAME, init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for number in range(groups):
        time.sleep(rank * 0.5)  # the other one waits for this one, and listens
        group = dist.new_group(backend=proven_gloo.NAME)
        values = torch.full((3,), float(rank + number))
        dist.all_reduce(values, group=group)
        dist.barrier(group)
        sums.append(values.tolist())
    print(json.dumps(sums))
except RunError as error:
    print(json.dumps(str(error)))
"""
MOST_GROUPS = 16
"""Which of two processes connects to the other is up to their ports: a stranger at one is lucky half the time."""


def start(rank: int, folder: Path, groups: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(rank), str(folder), str(groups)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def listening(process: subprocess.Popen[str]) -> set[int]:
    connections = psutil.Process(process.pid).net_connections("tcp") if process.poll() is None else []
    return {one.laddr.port for one in connections if one.status == psutil.CONN_LISTEN}


def take_place(port: int, rank: int) -> socket.socket:
    """A connection that says, as gloo's do, the number of the peer for whom the listener waits."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(struct.pack("<q", rank))
    return connection


def test_processes_that_prove_themselves_add_up(tmp_path: Path) -> None:
    processes = [start(rank, tmp_path, 2) for rank in (0, 1)]
    sums = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert sums == [[[1.0] * 3, [3.0] * 3]] * 2


def test_who_takes_anothers_place_is_found_before_anything_is_sent(tmp_path: Path) -> None:
    processes = [start(rank, tmp_path, MOST_GROUPS) for rank in (0, 1)]
    seen: set[int] = set()
    strangers = []
    deadline = time.monotonic() + 60
    while processes[0].poll() is None and time.monotonic() < deadline:
        for port in listening(processes[0]) - seen:
            seen.add(port)
            strangers += [take_place(port, rank) for rank in (0, 1)]
        time.sleep(0.01)
    said = [json.loads(process.communicate(timeout=30)[0]) for process in processes]
    for stranger in strangers:
        stranger.close()
    assert "was connected to by something that is not of the group" in said[0]
    assert isinstance(said[1], str)  # nor does the other go on
