"""What a federation costs beside the training, in simulation: a round's time less the sites' training, over the latter.

The sites of a round train for 20 seconds in all. A round lasts from the end of the one before it to its own end, so
messages, aggregation, both sides' checkpoints and the commit are in it. No round is evaluated but the first, which is
not counted.
"""

from __future__ import annotations

import statistics
import tempfile
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.figure import Figure
from benchmarks.fresh_process import in_fresh_process
from benchmarks.places import Places
from core_training.recipe.reading import parse_recipe
from core_training.runs.run_folder import RunFolder

TARGET = 3.0
TRAINING_SECONDS = 20.0
ROUNDS = 5
SITES = ("cdc", "nhlbi", "niddk", "seniorhealth")


def measure(places: Places) -> Figure:
    trial = _rounds(places, rounds=2, steps=5)
    steps = max(1, round(TRAINING_SECONDS / (trial[-1]["training"] / 5)))
    rounds = _rounds(places, ROUNDS, steps)
    return Figure(
        name="federation_overhead",
        meaning="a simulated round's time less local training, relative to the training",
        value=statistics.median(100 * (one["total"] / one["training"] - 1) for one in rounds),
        unit="%",
        target=TARGET,
        details={
            "sites": len(SITES),
            "steps_per_site_and_round": steps,
            "training_seconds": [one["training"] for one in rounds],
            "other_seconds": [one["total"] - one["training"] for one in rounds],
        },
    )


def _rounds(places: Places, rounds: int, steps: int) -> list[dict[str, float]]:
    files = ", ".join(str(places.sites[name]) for name in SITES)
    recipe = places.recipe(
        "data.eval_fraction=0.02",
        f"topology.rounds={rounds}",
        f"topology.local_steps={steps}",
        f"simulation.sites=[{files}]",
    )
    with tempfile.TemporaryDirectory() as folder:
        result: list[dict[str, float]] = in_fresh_process(run, recipe_text=recipe.to_yaml(), folder=folder).result
    return result


def run(recipe_text: str, folder: str) -> list[dict[str, float]]:
    """Simulate; returns the seconds of every round from the second on: in all, and of the sites' training."""
    from simulations import simulate

    run_folder = RunFolder(Path(folder) / "run")
    simulate(parse_recipe(recipe_text), run_folder)
    events = list(run_folder.lines("round"))
    return [
        {
            "total": (_time(this) - _time(before)).total_seconds(),
            "training": sum(site["seconds"] for site in this["sites"].values()),
        }
        for before, this in pairwise(events)
    ]


def _time(event: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(event["time"])
