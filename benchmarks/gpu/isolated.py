"""A part in a process of its own, which may fail, run out of memory or take too long without ending the others."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.fresh_process import ROOT
from benchmarks.gpu.parts import Part

_MOST_WORDS = 300


def outcome_of(part: Part, seconds: float, log: Path) -> dict[str, Any]:
    """Run a part for at most so many seconds: its `result`, or why it `failed`; with the `seconds` it took.

    What it writes to standard error is kept in `log`.
    """
    began = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.fresh_process", *part.function.split(":")]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [*command, json.dumps(part.arguments)],
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=ROOT,
            start_new_session=True,  # whatever it starts ends with it
        )
        try:
            printed, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            printed = b""
        finally:
            timed_out = process.poll() is None
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    took = {"seconds": time.monotonic() - began}
    if timed_out:
        return {"failed": f"it took longer than {seconds:.0f} s", **took}
    if process.returncode != 0:
        return {"failed": _reason(process.returncode, log), **took}
    return {"result": json.loads(printed)["result"], **took}


def _reason(code: int, log: Path) -> str:
    """The last line that a failed process wrote, or the signal that ended it."""
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}, as when memory runs out"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {code}")
    return re.sub(r"^[\w.]+\.(?=\w+: )", "", last)[:_MOST_WORDS]  # the error's class without its module
