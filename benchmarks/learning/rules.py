"""What each rule for putting sites' updates together comes to, on the six sites of MedQuAD, beside plain averaging.

All with what a recipe gets by itself but for the rule: rate, schedule and local steps are those of plain averaging, so
a rule that wants others is shown at a disadvantage. Losses are on the sites' held-out parts: the mean over sites and
the worst site of the model of all; and, of the models that sites end with, each on its own site's part. One seed, whose
runs are kept beside those of `defaults`.

The figure: a site's own model (`topology.own_steps`), on its own records, relative to the better of the common one and
of one that was trained on its records alone as long as the federation took; of the worst site.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.figure import Figure
from benchmarks.learning import defaults
from benchmarks.learning.kept_runs import trained_together
from benchmarks.learning.medquad_sites import ROUNDS, first_records, recipe_of, trained_at_each_rate
from benchmarks.places import Places
from core_training.recipe.schema import Recipe
from examples.demo.examiner import Examiner

SEED = 0
FOLDER = defaults.FOLDER / "six" / f"seed-{SEED}"
PLAIN, OWN = "plain averaging", "own steps"
TARGET = 1.0
RULES: Mapping[str, tuple[str, ...]] = {
    PLAIN: (),
    "equal weights": ("aggregation.weights=equal",),
    "outer Nesterov": ("aggregation.outer.step=nesterov",),
    "outer Adam": ("aggregation.outer.step=adam",),
    "FedProx": ("aggregation.proximal_mu=0.01",),
    "FFA": ("aggregation.adapters=ffa",),
    "RoLoRA": ("aggregation.adapters=rolora",),
    "FedSA": ("aggregation.adapters=fedsa",),
    "ranks 8, 4 and 2": ("tuning.lora.site_ranks={nhlbi: 4, niddk: 4, seniorhealth: 2}",),
    "half of the sites": ("topology.sites_per_round=0.5",),
    OWN: ("topology.own_steps=120",),
    "FedExP": ("aggregation.outer.step=fedexp",),
    "FlexLoRA": ("aggregation.rule=flexlora",),
    "passes": ("topology.local_epochs=0.02",),
    "median": ("aggregation.rule=median",),
    "trimmed mean": ("aggregation.rule=trimmed_mean",),
    "geometric median": ("aggregation.rule=geometric_median",),
    "multi-Krum": ("aggregation.rule=multi_krum",),
    "clipped mean": ("aggregation.rule=norm_clipped_mean",),
    "ring of 16 bits": ("privacy.codec=ring16",),
}


def measure(places: Places) -> Figure:
    records = {name: first_records(path, FOLDER / "records" / f"{name}.jsonl") for name, path in places.sites.items()}
    plain = recipe_of(places, records.values(), SEED)
    examiner = Examiner(plain)
    try:
        alone = {name: _alone(places, examiner, name, path) for name, path in records.items()}
        recipes = {rule: recipe_of(places, records.values(), SEED, *keys) for rule, keys in RULES.items()}
        table = {rule: row_of(rule, recipe, FOLDER, examiner) for rule, recipe in recipes.items()}
    finally:
        examiner.close()
    own, common = table[OWN]["own"], table[PLAIN]["sites"]
    return Figure(
        name="rules",
        meaning="a site's own model on its own records, over the better of the common one and one of its own alone",
        value=max(own[name] / min(common[name], alone[name]) for name in records),
        unit="",
        target=TARGET,
        details={"alone on own records": alone, "rules": table},
    )


def _alone(places: Places, examiner: Examiner, name: str, path: Path) -> float:
    """The loss on a site's own records of a model that was trained on them alone, at the best of three rates."""
    steps = ROUNDS * (recipe_of(places, [path], SEED).topology.local_steps or 0)
    runs = trained_at_each_rate(places, [path], SEED, steps, FOLDER / f"alone-{name}")
    return min(losses_of(examiner, run / "adapter")[name] for run in runs)


def row_of(rule: str, recipe: Recipe, folder: Path, examiner: Examiner) -> dict[str, Any]:
    """The losses by site of the model of all and of the sites' own, the bytes sent up, and the seconds."""
    run = trained_together(recipe, folder / ("federated" if rule == PLAIN else f"rule-{rule.replace(' ', '-')}"))
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    sites = losses_of(examiner, run / "adapter")
    own = {name: losses_of(examiner, _result_of(run, name))[name] for name in sites}
    return {
        "mean": mean(sites.values()),
        "worst": max(sites.values()),
        "mean of own": mean(own.values()),
        "bytes_up": summary["bytes_up"],
        "seconds": summary["seconds"]["total"],
        "sites": sites,
        "own": own,
    }


def losses_of(examiner: Examiner, adapter: Path) -> dict[str, float]:
    return {name: part.eval_loss for name, part in examiner.examine(adapter).hospitals.items()}


def _result_of(run: Path, site: str) -> Path:
    """The adapter that a site ends with: its own, where it has one."""
    folder = run / "sites" / site
    return min([*folder.glob("*/own/adapter"), *folder.glob("*/adapter")], key=lambda path: path.parent.name != "own")
