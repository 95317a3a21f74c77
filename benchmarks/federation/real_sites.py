"""Three real sites on this machine against the same work simulated: what sharing the cores, and being real, cost.

A SuperLink and three sites, each with SuperNode and worker, train at once; the simulation's sites train in
turn in one process. Both take the same rounds of the same recipe, one pair after the other. Counted is from the end of
the first round, which alone is evaluated, to the end of the last. Every process has as many threads as it would take of
itself: OpenMP's, that wait for each other by spinning, are what three processes on two cores lose their time with.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path

from benchmarks.federation.deployed import deployed, moment, run_to_the_end
from benchmarks.figure import Figure
from benchmarks.fresh_process import in_fresh_process
from benchmarks.places import Places
from core_training.recipe.reading import parse_recipe
from core_training.runs.run_folder import RunFolder

TARGET = 1.3
PAIRS = 2
ROUNDS = 5
STEPS = 20
SITES = ("cdc", "nhlbi", "niddk")
WORK = (
    "data.eval_fraction=0.02",
    f"topology.rounds={ROUNDS}",
    f"topology.local_steps={STEPS}",
    f"topology.eval_every={ROUNDS}",
)


def measure(places: Places) -> Figure:
    files = ", ".join(str(places.sites[name]) for name in SITES)
    simulated_recipe = places.recipe(*WORK, f"simulation.sites=[{files}]")
    real: list[float] = []
    simulated: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = {name: places.sites[name] for name in SITES}
        with deployed(folder, places, records, places.model, *WORK) as (federation, recipe):
            for number in range(PAIRS):
                real.append(_seconds(run_to_the_end(federation, recipe, len(SITES))))
                run = str(folder / f"simulated-{number}")
                in_fresh_process(simulate, recipe_text=simulated_recipe.to_yaml(), folder=run)
                simulated.append(_seconds(RunFolder(Path(run))))
    return Figure(
        name="real_sites",
        meaning=f"{len(SITES)} real sites' time for the rounds, relative to the same rounds simulated",
        value=statistics.median(one / other for one, other in zip(real, simulated, strict=True)),
        unit="",
        target=TARGET,
        details={
            "real_seconds": real,
            "simulated_seconds": simulated,
            "steps_per_site_and_round": STEPS,
            "rounds_counted": ROUNDS - 1,
            "threads": {
                name: os.environ.get(name) for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
            },
        },
    )


def simulate(recipe_text: str, folder: str) -> None:
    """Run the sites in this process."""
    from simulations import simulate as run_simulation

    run_simulation(parse_recipe(recipe_text), RunFolder(Path(folder)))


def _seconds(run: RunFolder) -> float:
    rounds = list(run.lines("round"))
    return (moment(rounds[-1]) - moment(rounds[0])).total_seconds()
