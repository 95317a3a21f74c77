"""`python -m benchmarks.gpu [--tiny]`: measure what a machine with one GPU must show, in ten minutes at most.

Every part runs in a process of its own with a time limit. A part that fails is a line of the result, one that no longer
fits into the time is skipped, and says so. Without a GPU, or with --tiny, shapes are tiny. Exit code 1: a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import core_training.foundation.environment  # noqa: F401 - before anything that might call home
from benchmarks.gpu import flops, table
from benchmarks.gpu.isolated import outcome_of
from benchmarks.gpu.parts import Part, plan
from benchmarks.places import OUTPUT
from core_training.foundation.durable import commit_file

SECONDS = 600.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny shapes; so it is without a GPU")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="the time for all parts")
    parser.add_argument("--only", default="", metavar="WORD", help="the parts with this in their name")
    out = Path(os.environ.get("OUT", OUTPUT)) / "gpu.json"
    parser.add_argument("--out", type=Path, default=out, metavar="FILE")
    given = parser.parse_args(arguments)
    began = time.monotonic()
    folder = (OUTPUT / "gpu").absolute()
    report: dict[str, Any] = {"schema": 1, "measured": datetime.now(UTC).isoformat("T", "seconds"), "parts": []}
    machine = outcome_of(
        Part("machine", "benchmarks.gpu.device:describe"), given.seconds, folder / "logs" / "machine.log"
    )
    if "failed" in machine:
        print(f"machine: {machine['failed']}", file=sys.stderr)
        return 1
    tiny = given.tiny or machine["result"]["kind"] == "cpu"
    report |= {"machine": machine["result"], "tiny": tiny, "formula": flops.FORMULA, "budget_seconds": given.seconds}
    done: dict[str, dict[str, Any]] = {}
    try:
        for part in _chosen(plan(machine["result"], str(folder), tiny=tiny), given.only):
            left = given.seconds - (time.monotonic() - began)
            done[part.name] = _outcome(part, left, done, folder)
            print(_line(part.name, done[part.name]), flush=True)
            report["parts"] = [{"name": name, **outcome} for name, outcome in done.items()]
            report["seconds"] = time.monotonic() - began
            commit_file(given.out, (json.dumps(report, indent=2) + "\n").encode())
    finally:
        shutil.rmtree(folder / "models", ignore_errors=True)
    print("", *table.lines(report), "", f"all values: {given.out}", sep="\n")
    return int(any("failed" in outcome for outcome in done.values()))


def _chosen(parts: list[Part], word: str) -> list[Part]:
    """The parts with a word in their name, and those that they need."""
    names = {part.name for part in parts if word in part.name}
    needed = {part.needs for part in parts if part.name in names}
    return [part for part in parts if part.name in names | needed]


def _outcome(part: Part, left: float, done: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Run a part where it can be, and where there is time."""
    if part.not_measured is not None:
        return {"not_measured": part.not_measured}
    if part.needs is not None and "result" not in done.get(part.needs, {}):
        return {"skipped": f"{part.needs} is not there"}
    if left < part.least:
        return {"skipped": f"{max(left, 0):.0f} s are left, and it takes {part.least:.0f} s or more"}
    return outcome_of(part, min(part.limit, left), folder / "logs" / f"{part.name.replace(' ', '-')}.log")


def _line(name: str, outcome: dict[str, Any]) -> str:
    for reason in ("failed", "skipped", "not_measured"):
        if reason in outcome:
            return f"{name}: {reason.replace('_', ' ')}: {outcome[reason]}"
    return f"{name}: {outcome['seconds']:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
