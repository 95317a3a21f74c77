"""What rules come to among twenty sites whose questions are of unlike types, beside alone and central. One seed.

The first records of MedQuAD's six sites, divided by their type of question in proportions from Dirichlet(0.1): a site
has a few types, and few records. All with what a recipe gets by itself but for the rule. Losses are on the sites'
held-out parts, gaps as in `defaults`; alone has the best of three rates over all sites, central its best of three.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean

from benchmarks.figure import Figure
from benchmarks.learning.kept_runs import trained_centrally
from benchmarks.learning.medquad_sites import RATES, ROUNDS, first_records, recipe_of, trained_at_each_rate
from benchmarks.learning.rules import PLAIN, losses_of, row_of
from benchmarks.places import OUTPUT, Places
from core_training.models.shapes import hidden_size
from core_training.recipe.learning_rate import learning_rate_of
from examples.demo.examiner import Examiner
from simulations.sites import simulated_sites

SEED = 0
FOLDER = OUTPUT / "skewed"
SITES = 20
TARGET = 0.85
RULES: Mapping[str, tuple[str, ...]] = {
    PLAIN: (),
    "equal weights": ("aggregation.weights=equal",),
    "outer Nesterov": ("aggregation.outer.step=nesterov",),
    "FedProx": ("aggregation.proximal_mu=0.01",),
    "FFA": ("aggregation.adapters=ffa",),
    "RoLoRA": ("aggregation.adapters=rolora",),
    "FedSVD": ("aggregation.adapters=fedsvd",),
    "FlexLoRA": ("aggregation.rule=flexlora",),
    "median": ("aggregation.rule=median",),
    "half of the sites": ("topology.sites_per_round=0.5",),
}


def measure(places: Places) -> Figure:
    records = _divided(places)
    examiner = Examiner(recipe_of(places, records.values(), SEED, "topology.kind=central"))
    try:
        alone = _alone(places, records, examiner)
        steps = SITES * ROUNDS * (recipe_of(places, records.values(), SEED).topology.local_steps or 0)
        turns = f"data.mix={json.dumps(dict.fromkeys(records, 1.0))}"
        central = {
            name: min(
                mean(losses_of(examiner, run / "adapter").values())
                for run in trained_at_each_rate(places, records.values(), SEED, steps, FOLDER / name, *keys)
            )
            for name, keys in {"pooled": (), "turns": (turns,)}.items()
        }
        recipes = {rule: recipe_of(places, records.values(), SEED, *keys) for rule, keys in RULES.items()}
        table = {rule: row_of(rule, recipe, FOLDER, examiner) for rule, recipe in recipes.items()}
    finally:
        examiner.close()
    for row in table.values():
        row["gaps"] = {name: (alone - row["mean"]) / (alone - loss) for name, loss in central.items()}
    return Figure(
        name="skewed",
        meaning="the gap to central in equal turns that plain averaging closes among 20 label-skewed sites",
        value=table[PLAIN]["gaps"]["turns"],
        unit="",
        target=TARGET,
        at_least=True,
        details={"alone": alone, "central": central, "rules": table},
    )


def _divided(places: Places) -> dict[str, Path]:
    """A file of records for each site."""
    pool = [first_records(path, FOLDER / "pool" / f"{name}.jsonl") for name, path in places.sites.items()]
    partition = f"simulation={{partition: dirichlet, by: qtype, alpha: 0.1, count: {SITES}}}"
    sites = simulated_sites(recipe_of(places, pool, SEED, "simulation.sites=null", partition))
    files = {name: FOLDER / "records" / f"{name}.jsonl" for name in sites}
    for name, path in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(record.fields, ensure_ascii=False) + "\n" for record in sites[name]]
        path.write_text("".join(lines), encoding="utf-8")
    return files


def _alone(places: Places, records: Mapping[str, Path], examiner: Examiner) -> float:
    """The mean over the sites' models of their loss on all sites' parts, at the best of three rates for all of them."""
    usual = learning_rate_of(
        recipe_of(places, records.values(), SEED, "topology.kind=central"), hidden_size(places.model)
    )
    losses = {}
    for factor in RATES:
        rate = f"training.learning_rate={factor * usual}"
        runs = [_one(places, name, path, factor, rate) for name, path in records.items()]
        losses[factor] = mean(mean(losses_of(examiner, run / "adapter").values()) for run in runs)
    return min(losses.values())


def _one(places: Places, name: str, path: Path, factor: float, rate: str) -> Path:
    steps = ROUNDS * (recipe_of(places, [path], SEED).topology.local_steps or 0)
    recipe = recipe_of(places, [path], SEED, "topology.kind=central", f"training.max_steps={steps}", rate)
    return trained_centrally(recipe, FOLDER / f"alone-{name}-{factor}")
