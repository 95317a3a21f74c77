"""Processor seconds of `--help` for the slowest of fedloom's commands: what a person waits for before anything is done.

Each command in a process of its own, the least of three: what else is on a core lengthens processor time, too, and the
first time after an installation compiles what it imports.
"""

from __future__ import annotations

import resource
import subprocess
import sys

from benchmarks.figure import Figure
from benchmarks.places import Places
from fedloom.cli import COMMANDS

TARGET = 1.0
TURNS = 3
BELOW = ("recipe new", "recipe check", "server start", "client start", "p2p start")
"""Commands of groups, one or two for each group."""


def measure(_: Places) -> Figure:
    seconds = {command: _seconds_of_help(command) for command in (*COMMANDS, *BELOW)}
    return Figure(
        name="help",
        meaning="processor time of `--help` of the slowest command",
        value=max(seconds.values()),
        unit="s",
        target=TARGET,
        details={"seconds": seconds},
    )


def _seconds_of_help(command: str) -> float:
    took = []
    for _ in range(TURNS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        asked = [sys.executable, "-m", "fedloom.cli", *command.split(), "--help"]
        subprocess.run(asked, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(took)
