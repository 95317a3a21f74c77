"""A function in a process of its own, and the most memory that process ever held.

`python -m benchmarks.fresh_process MODULE FUNCTION ARGUMENTS` is the other side: arguments and result are JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import core_training.foundation.environment  # noqa: F401 - before anything that might call home
from core_training.foundation.errors import RunError

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Outcome:
    """What the function returned, and the process's peak of resident memory in bytes."""

    result: Any
    peak_bytes: int


def in_fresh_process(function: Callable[..., Any], **arguments: Any) -> Outcome:
    """Call a module's function with JSON-able keyword arguments. Raises RunError when it fails."""
    command = [sys.executable, "-m", "benchmarks.fresh_process", function.__module__, function.__name__]
    finished = subprocess.run([*command, json.dumps(arguments)], stdout=subprocess.PIPE, cwd=ROOT, check=False)
    if finished.returncode != 0:
        raise RunError(f"{function.__module__}.{function.__name__} failed; what it wrote above says why")
    return Outcome(**json.loads(finished.stdout))


def peak_bytes(process: int | Literal["self"] = "self") -> int:
    """A process's peak, 0 where it has ended.

    The kernel's `ru_maxrss` will not do: it begins with the size of the process that forked.
    """
    return _of_status("VmHWM", process)


def resident_bytes() -> int:
    """What this process holds at the moment."""
    return _of_status("VmRSS")


def forget_peak() -> None:
    """Let the peak begin anew from what is held at the moment (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _of_status(name: str, process: int | Literal["self"] = "self") -> int:
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    line = next((line for line in status.splitlines() if line.startswith(f"{name}:")), None)
    return 0 if line is None else int(line.split()[1]) * 1024


def main() -> None:
    from fedloom.console import results_only_on_stdout

    module, function, arguments = sys.argv[1:]
    with results_only_on_stdout():
        result = getattr(import_module(module), function)(**json.loads(arguments))
    print(json.dumps({"result": result, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()
