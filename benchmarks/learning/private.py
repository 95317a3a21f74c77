"""What ε costs: the held-out loss of a central run on one site's records, plain, only clipped, and at three ε.

Large batches and few steps, as noise is divided by the batch. One seed. The figure: how much of what a plain run of
the same steps learns is left at ε 8. With it a table of what hiding whole sites costs: the noise in the mean of n sites
over the most that one site's update can be, which needs no training to be known.
"""

from __future__ import annotations

import math
from typing import Any

from benchmarks.figure import Figure
from benchmarks.learning.kept_runs import trained_centrally
from benchmarks.learning.medquad_sites import recipe_of
from benchmarks.places import OUTPUT, Places
from core_training.privacy.accounting import noise_multiplier_for
from core_training.runs.run_folder import RunFolder

TARGET = 0.5
SITE = "gard"
BATCH, STEPS, RATE = 64, 60, 2e-3
SETTINGS = {
    "plain": None,
    "clipped": "{noise_multiplier: 1.0e-06}",
    "ε 8": "{epsilon: 8.0}",
    "ε 3": "{epsilon: 3.0}",
    "ε 1": "{epsilon: 1.0}",
}
SITES, ROUNDS, VALUES, EPSILON = (6, 20, 100, 1000), 10, 224_000, 8.0


def measure(places: Places) -> Figure:
    rows = {name: _row(places, name, terms) for name, terms in SETTINGS.items()}
    learnt = {name: row["initial"] - row["loss"] for name, row in rows.items()}
    return Figure(
        name="private",
        meaning="of what a plain run learns, what is learnt at ε 8 for each record",
        value=learnt["ε 8"] / learnt["plain"],
        unit="",
        target=TARGET,
        at_least=True,
        details={"runs": rows, "sites": _of_sites()},
    )


def _row(places: Places, name: str, terms: str | None) -> dict[str, Any]:
    keys = [
        *("topology.kind=central", f"training.max_steps={STEPS}", f"training.learning_rate={RATE}"),
        *(f"training.per_device_train_batch_size={BATCH}", "training.eval_steps=1000", "training.save_steps=1000"),
        *([f"privacy.differential_privacy={terms}"] if terms else []),
    ]
    recipe = recipe_of(places, [places.sites[SITE]], 0, *keys)
    folder = trained_centrally(recipe, OUTPUT / "private" / name.replace(" ", "-"))
    summary = RunFolder(folder).summary() or {}
    account = summary.get("privacy") or {}
    return {
        "initial": summary["eval_loss_initial"],
        "loss": summary["eval_loss"],
        "epsilon": account.get("epsilon"),
        "noise_multiplier": account.get("noise_multiplier"),
        "seconds": summary["seconds"]["training"],
    }


def _of_sites() -> dict[int, dict[str, float]]:
    """For n sites that all take part, at ε 8 over ten rounds: the noise in the mean, all values together, in clips."""
    noise = noise_multiplier_for(EPSILON, 1e-5, 1.0, ROUNDS)
    return {n: {"noise_multiplier": noise, "noise_in_the_mean": noise * math.sqrt(VALUES) / n} for n in SITES}
