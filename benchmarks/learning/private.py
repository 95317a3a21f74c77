"""What ε costs: the held-out loss of a central run on one site's records, plain, only clipped, and at three ε.

Large batches and few steps, as noise is divided by the batch. One seed. The figure: how much of what a plain run of
the same steps learns is left at ε 8. Two tables are with it. What noise does to a secret: a made-up record among a few,
trained on until a plain run knows it by heart, and how far ahead of others like it the model puts it (its exposure, in
bits: Carlini et al. 2019). And what hiding whole sites costs: the noise in the mean of n sites over the most that one
site's update can be, which needs no training to be known.
"""

from __future__ import annotations

import gzip
import json
import math
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.figure import Figure
from benchmarks.learning.kept_runs import trained_centrally
from benchmarks.learning.medquad_sites import recipe_of
from benchmarks.places import OUTPUT, Places
from core_training.engine.engine import open_engine
from core_training.privacy.accounting import noise_multiplier_for
from core_training.recipe.schema import Recipe
from core_training.runs.result_format import read_result
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
QUESTION = "What is the code of the patient in room seven?"
LIKE, OTHERS, SECRET_STEPS, SECRET_RATE = 256, 63, 120, 5e-3
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
        details={"runs": rows, "exposure": _exposures(places), "sites": _of_sites()},
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


def _exposures(places: Places) -> dict[str, dict[str, float | None]]:
    """The exposure of one secret record, by setting; at most log2 of the number of its like."""
    folder = OUTPUT / "private" / "secret"
    folder.mkdir(parents=True, exist_ok=True)
    random = Random(0)
    codes = random.sample(range(10**6), LIKE)
    records = [{"question": QUESTION, "answer": f"{code:06d}"} for code in codes]
    with gzip.open(places.sites[SITE], "rt", encoding="utf-8") as lines:
        others = [json.loads(line) for line in islice(lines, OTHERS)]
    _write(folder / "train.jsonl", [*others, records[0]])
    for number, record in enumerate(records):
        _write(folder / "like" / f"{number:03d}.jsonl", [record])
    judge = open_engine(_secret_recipe(places, folder, None, f"data.eval={folder / 'like'}"))
    found: dict[str, dict[str, float | None]] = {}
    for name, terms in SETTINGS.items():
        run = trained_centrally(_secret_recipe(places, folder, terms), folder / name.replace(" ", "-"))
        judge.write_state(read_result(run / "adapter", judge.manifest))
        losses = {source: report.loss or 0.0 for source, report in judge.evaluate().items()}
        rank = 1 + sum(loss < losses["000"] for loss in losses.values())
        account = (RunFolder(run).summary() or {}).get("privacy") or {}
        found[name] = {"exposure": math.log2(LIKE / rank), "epsilon": account.get("epsilon")}
    judge.close()
    return found


def _secret_recipe(places: Places, folder: Path, terms: str | None, *more: str) -> Recipe:
    keys = [
        *("topology.kind=central", f"training.max_steps={SECRET_STEPS}", f"training.learning_rate={SECRET_RATE}"),
        *("training.per_device_train_batch_size=16", "data.eval_fraction=0", "training.save_steps=1000"),
        *([f"privacy.differential_privacy={terms}"] if terms else []),
    ]
    return recipe_of(places, [folder / "train.jsonl"], 0, *keys, *more)


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _of_sites() -> dict[int, dict[str, float]]:
    """For n sites that all take part, at ε 8 over ten rounds: the noise in the mean, all values together, in clips."""
    noise = noise_multiplier_for(EPSILON, 1e-5, 1.0, ROUNDS)
    return {n: {"noise_multiplier": noise, "noise_in_the_mean": noise * math.sqrt(VALUES) / n} for n in SITES}
