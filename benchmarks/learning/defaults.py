"""What sites reach together with a recipe that names no rate, schedule or local steps, and alone, and central.

Gap closed = (alone − x) / (alone − central), of the mean over sites of the loss on each site's held-out part. A site
alone takes rounds × local steps on its own records, central training takes as many as all sites together, over the
records as they come (pooled) or as many of each site (equal turns). Federated and gossip have what the recipe gets by
itself; alone and central have the best of three rates around it, chosen on these very records: in their favour.

Sets of sites: the six of MedQuAD, and the three largest of those that the small base was not pre-trained on. Runs that
`runs/bench/defaults` holds already, completed and of the same recipe, are not run again: remove the folder to start
afresh.

Two more federated runs, at half and at twice the rate that a recipe gets, say how near it is to the best.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from benchmarks.figure import Figure
from benchmarks.learning.kept_runs import trained_together
from benchmarks.learning.medquad_sites import ROUNDS, first_records, recipe_of, trained_at_each_rate
from benchmarks.places import OUTPUT, Places
from core_training.models.shapes import hidden_size
from core_training.recipe.learning_rate import learning_rate_of, with_sites
from examples.demo.examiner import Examiner

TARGET = 0.85
FOLDER = OUTPUT / "defaults"
SETS = {"six": None, "three": ("nhlbi", "niddk", "seniorhealth")}
SEEDS = (0, 1, 2)
TOGETHER = {
    "federated": ("topology.kind=federated",),
    "gossip": ("topology.kind=gossip",),
    "exponential": ("topology.kind=gossip", "aggregation.mixing=metropolis", "topology.graph=exponential"),
}
"""The topologies by name: `gossip` is one group, `exponential` has each node talk to those 1, 2, 4, … places away."""


def measure(places: Places) -> Figure:
    table = {
        name: [_gaps(places, chosen or tuple(places.sites), FOLDER / name / f"seed-{seed}", seed) for seed in SEEDS]
        for name, chosen in SETS.items()
    }
    closed = [row[f"{kind}, of turns"] for rows in table.values() for row in rows for kind in TOGETHER]
    return Figure(
        name="defaults",
        meaning="the gap to central in equal turns that recipes without a rate close: the least of all runs",
        value=min(closed),
        unit="",
        target=TARGET,
        at_least=True,
        details={name: _means(rows) | {"seeds": rows} for name, rows in table.items()},
    )


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: mean(row[key] for row in rows) for key in rows[0]}


def _gaps(places: Places, sites: tuple[str, ...], folder: Path, seed: int) -> dict[str, float]:
    """The losses by how a model was trained, and the gaps that the federated and the gossip one close."""
    records = {name: first_records(places.sites[name], folder / "records" / f"{name}.jsonl") for name in sites}
    steps = ROUNDS * (recipe_of(places, records.values(), seed).topology.local_steps or 0)
    width = hidden_size(places.model)
    examiner = Examiner(recipe_of(places, records.values(), seed, "topology.kind=central"))

    def loss_of(run: Path) -> float:
        results = [run / "adapter"] if (run / "adapter").exists() else sorted(run.glob("sites/*/simulation/adapter"))
        marks = [examiner.examine(result) for result in results]  # several where sites ended with different ones
        return mean(part.eval_loss for mark in marks for part in mark.hospitals.values())

    def central(name: str, files: Iterable[Path], steps: int, *overrides: str) -> float:
        return min(map(loss_of, trained_at_each_rate(places, files, seed, steps, folder / name, *overrides)))

    turns = f"data.mix={json.dumps(dict.fromkeys(sites, 1.0))}"
    losses = {
        "alone": mean(central(f"alone-{name}", [path], steps) for name, path in records.items()),
        "pooled": central("pooled", records.values(), steps * len(sites)),
        "turns": central("turns", records.values(), steps * len(sites), turns),
    }
    for kind, keys in TOGETHER.items():
        recipe = recipe_of(places, records.values(), seed, *keys)
        losses[kind] = loss_of(trained_together(recipe, folder / kind))
    own = learning_rate_of(with_sites(recipe_of(places, records.values(), seed), len(sites)), width)
    for factor in (0.5, 2.0):
        recipe = recipe_of(places, records.values(), seed, f"training.learning_rate={factor * own}")
        losses[f"federated, {factor:g} × the rate"] = loss_of(trained_together(recipe, folder / f"federated-{factor}"))
    examiner.close()
    gaps = {
        f"{kind}, of {of}": (losses["alone"] - losses[kind]) / (losses["alone"] - losses[of])
        for kind in TOGETHER
        for of in ("pooled", "turns")
    }
    return losses | gaps
