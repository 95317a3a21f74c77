"""Peak memory of 32 simulated sites, against one site's plus 32 times what a site must keep: state and optimizer state.

Each simulation runs in a process of its own, on the same records: divided among 32 sites, or all at one. Both tuning
modes are measured: with LoRA what is kept per site is small and its overhead shows; with full tuning any copy too many
does. The figure is the worse of the two.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.figure import Figure
from benchmarks.fresh_process import in_fresh_process
from benchmarks.places import Places
from core_training.recipe.reading import parse_recipe
from core_training.runs.run_folder import RunFolder

SITES = 32
ALLOWED = 1.05
STATE_AND_ADAM = 3 * 4
"""Bytes per trained parameter: its value and Adam's two moments, in float32."""


def measure(places: Places) -> Figure:
    details: dict[str, dict[str, float]] = {}
    for mode in ("lora", "full"):
        one, _ = _peak(places, mode, 1)
        many, parameters = _peak(places, mode, SITES)
        bound = one + SITES * STATE_AND_ADAM * parameters
        details[mode] = {
            "one_site_bytes": one,
            f"sites_{SITES}_bytes": many,
            "trained_parameters": parameters,
            "one_site_plus_states_bytes": bound,
            "ratio": many / bound,
        }
    return Figure(
        name="simulated_memory",
        meaning=f"peak memory of {SITES} simulated sites, relative to one site's + {SITES} × (state + optimizer state)",
        value=max(of_mode["ratio"] for of_mode in details.values()),
        unit="",
        target=ALLOWED,
        details=details,
    )


def _peak(places: Places, mode: str, sites: int) -> tuple[int, int]:
    """Peak bytes of a simulation, and its trained parameters."""
    recipe = places.recipe(
        f"tuning.mode={mode}",
        f"data.train={places.sites['seniorhealth']}",
        "data.eval_fraction=0.05",
        "training.per_device_train_batch_size=4",
        "training.per_device_eval_batch_size=4",
        "topology.rounds=2",
        "topology.local_steps=2",
        f"simulation={{partition: iid, count: {sites}}}",
    )
    with tempfile.TemporaryDirectory() as folder:
        outcome = in_fresh_process(run, recipe_text=recipe.to_yaml(), folder=folder)
    return outcome.peak_bytes, outcome.result


def run(recipe_text: str, folder: str) -> int:
    """Simulate; returns the number of trained parameters."""
    from simulations import simulate

    summary = simulate(parse_recipe(recipe_text), RunFolder(Path(folder) / "run"))
    return summary.trainable_parameters or 0
