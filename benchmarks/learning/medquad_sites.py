"""MedQuAD's sites as the learning benchmarks train them: the first records of each, and one short recipe."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from benchmarks.learning.kept_runs import trained_centrally
from benchmarks.places import Places
from core_training.models.shapes import hidden_size
from core_training.recipe.learning_rate import learning_rate_of
from core_training.recipe.reading import parse_recipe
from core_training.recipe.schema import Recipe

ROUNDS = 24
RECORDS = 600
"""Of each site, at most."""
RATES = (0.5, 1.0, 2.0)
"""Times the rate that a central run of this model has by itself: alone and central have the best of the three."""

_RECIPE = """
stage: sft
data: {columns: {prompt: question, completion: answer}, eval_fraction: 0.1}
training: {per_device_train_batch_size: 2, per_device_eval_batch_size: 32, max_length: 64, packing: false}
"""


def recipe_of(places: Places, files: Iterable[Path], seed: int, *overrides: str) -> Recipe:
    """A recipe of these sites that names no rate, schedule or local steps."""
    listed = f"[{', '.join(str(path.absolute()) for path in files)}]"
    here = (f"model.name_or_path={places.model}", f"data.train={listed}", f"simulation.sites={listed}")
    length = (f"topology.rounds={ROUNDS}", "topology.eval_every=1000", f"training.seed={seed}")
    text = f"model: {{name_or_path: base}}\ntopology: {{kind: federated}}\n{_RECIPE}"
    return parse_recipe(text, source="sites", overrides=[*here, *length, *overrides])


def trained_at_each_rate(
    places: Places, files: Iterable[Path], seed: int, steps: int, path: Path, *overrides: str
) -> list[Path]:
    """Central runs of so many steps on these files, one at each of `RATES`, in folders whose names begin as `path`."""
    files = list(files)
    usual = learning_rate_of(recipe_of(places, files, seed, "topology.kind=central"), hidden_size(places.model))
    runs = []
    for factor in RATES:
        rate, length = f"training.learning_rate={factor * usual}", f"training.max_steps={steps}"
        recipe = recipe_of(places, files, seed, "topology.kind=central", length, rate, *overrides)
        runs.append(trained_centrally(recipe, path.with_name(f"{path.name}-{factor}")))
    return runs


def first_records(source: Path, path: Path) -> Path:
    """The first records of a site in a file of their own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        path.write_text("".join(islice(lines, RECORDS)), encoding="utf-8")
    return path
