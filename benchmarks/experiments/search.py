"""What a search takes beside its trials: Optuna with its journal, the folders, and opening an engine for each trial.

A search of 12 trials over learning rate and schedule, pruned by the median, in a process of its own, on one thread.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from benchmarks.figure import Figure
from benchmarks.fresh_process import ROOT
from benchmarks.places import Places
from core_training.foundation.errors import RunError

TRIALS = 12
MOST_OF_THE_SEARCH = 0.1
MOST_OPENING = 0.3
RECORDS = 400


def measure(places: Places) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "search.yaml"
        path.write_text(yaml.safe_dump(_search(places, folder)), encoding="utf-8")
        command = [sys.executable, "-m", "fedloom.cli", "tune", str(path), "--json", "--quiet"]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True, check=False)
        if ended.returncode != 0:
            raise RunError(f"fedloom tune ended with {ended.returncode}: {ended.stderr[-500:]}")
        told = json.loads(ended.stdout)
        history = json.loads((folder / "search" / "search.json").read_text())["history"]
    whole, bookkeeping = told["seconds"]["here"], told["seconds"]["bookkeeping"]
    openings = [trial["seconds"]["opening"] for trial in history]
    details = {"seconds": told["seconds"], "pruned": told["pruned"], "openings": openings}
    details["trials"] = [trial["seconds"]["trial"] for trial in history]
    yield Figure(
        name="search_bookkeeping",
        meaning=f"Optuna, its journal and the folders, as a share of a search of {TRIALS} trials",
        value=bookkeeping / whole,
        unit="",
        target=MOST_OF_THE_SEARCH,
        details=details,
    )
    yield Figure(
        name="search_opening",
        meaning="opening an engine for a trial on the base that is there (the median of all but the first)",
        value=statistics.median(openings[1:]),
        unit="s",
        target=MOST_OPENING,
        details=details,
    )


def _search(places: Places, folder: Path) -> dict[str, object]:
    recipe = places.recipe(
        "topology.kind=central",
        "training.max_steps=12",
        "training.eval_steps=3",
        f"data.train={next(iter(places.sites.values()))}",
        f"data.max_samples={RECORDS}",
        name="central",
    )
    return {
        "recipe": recipe.model_dump(mode="json"),
        "keys": {
            "training.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
            "training.lr_scheduler_type": ["constant", "cosine"],
            "training.weight_decay": {"low": 0.0, "high": 0.1},
        },
        "trials": TRIALS,
        "output": str(folder / "search"),
    }
