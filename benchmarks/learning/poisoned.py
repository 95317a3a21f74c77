"""What poisoned sites do to a federation, and which rules bear them: 8 and 12 sites cut out of MedQuAD's six.

Attacks: a site sends its change the other way, or ten times as much of it, or noise of ten times its length; or it
trains on answers whose words are in disorder, and holds such records out. `multi_krum` is told how many are poisoned;
the group gate has 4 groups, so of 2 or 3 sites, which with 12 is what masks take. Losses are the mean over those sites
that are honest in all rows, of the result on their held-out records. One seed; runs that `runs/bench/poisoned` holds
already, completed and of the same recipe, are not run again.

The figure: the loss that the group gate's result has above plain averaging's without any poisoned site, at the worst.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from statistics import mean

from rich.table import Table

from benchmarks.figure import Figure
from benchmarks.learning.kept_runs import trained_together
from benchmarks.learning.poisoned_sites import ATTACKS, poisoned
from benchmarks.places import OUTPUT, Places
from core_training.recipe.reading import parse_recipe
from core_training.recipe.schema import Recipe
from examples.demo.examiner import Examiner
from fedloom.console import stderr

TARGET = 0.1
SEED = 0
SIZES, POISONED = (8, 12), (1, 2)
RECORDS = 24
FOLDER = OUTPUT / "poisoned"
NOBODY, LABELS = "none", "labels"
GATE = "group_gate"
RULES = ("fedavg", "median", "multi_krum", GATE)

_RECIPE = """
stage: sft
data: {columns: {prompt: question, completion: answer}, eval_fraction: 0.25}
training: {per_device_train_batch_size: 2, per_device_eval_batch_size: 16, max_length: 48, packing: false}
topology: {kind: federated, rounds: 4, local_steps: 3, eval_every: 100}
aggregation: {group_gate: {groups: 4}}
"""


def measure(places: Places) -> Figure:
    table = {f"{sites} sites": _of_so_many(places, sites) for sites in SIZES}
    stderr.print(_printed(table))
    added = [
        row[GATE] - rows[NOBODY]["fedavg"]
        for rows in table.values()
        for attack, row in rows.items()
        if attack != NOBODY
    ]
    return Figure(
        name="poisoned",
        meaning="held-out loss under the worst attack with group_gate, above plain averaging's without any",
        value=max(added),
        unit="nats per token",
        target=TARGET,
        details=table,
    )


def _of_so_many(places: Places, count: int) -> dict[str, dict[str, float]]:
    """The loss of the sites that are always honest, by attack and by rule."""
    clean = {name: _written(places, name, number, shuffled=False) for number, name in enumerate(_names(places, count))}
    spoilt = {name: _written(places, name, number, shuffled=True) for number, name in enumerate(clean)}
    examiner = Examiner(_recipe(places, clean, "fedavg", 1))
    rows: dict[str, dict[str, float]] = {}
    try:
        for attack, bad in _attacks(list(clean)):
            files = {**clean, **{name: spoilt[name] for name in bad}} if attack == LABELS else clean
            label = f"{attack}, {len(bad)}" if bad else attack
            rows[label] = {}
            for rule in RULES:
                recipe = _recipe(places, files, rule, max(len(bad), 1))
                path = FOLDER / f"{count}-{label.replace(', ', '-').replace(' ', '-')}-{rule}"
                with poisoned(bad, ATTACKS[attack]) if attack in ATTACKS else nullcontext():
                    run = trained_together(recipe, path)
                marks = examiner.examine(run / "adapter").hospitals
                rows[label][rule] = mean(marks[name].eval_loss for name in _honest(list(clean)))
    finally:
        examiner.close()
    return rows


def _attacks(names: list[str]) -> Iterator[tuple[str, list[str]]]:
    yield NOBODY, []
    for attack in (*ATTACKS, LABELS):
        for count in POISONED:
            yield attack, names[1 : 1 + count]


def _honest(names: list[str]) -> list[str]:
    """Those that are poisoned in no row."""
    return [names[0], *names[1 + max(POISONED) :]]


def _names(places: Places, count: int) -> list[str]:
    """Names of sites that are each a part of one of the real ones."""
    real = list(places.sites)
    return [f"{real[number % len(real)]}-{number // len(real)}" for number in range(count)]


def _written(places: Places, name: str, number: int, *, shuffled: bool) -> Path:
    """A site's records in a file: a part of its real site's that is no other's."""
    source, part = name.rsplit("-", 1)
    path = FOLDER / "records" / ("shuffled" if shuffled else "clean") / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(places.sites[source], "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in islice(lines, int(part) * RECORDS, (int(part) + 1) * RECORDS)]
    if shuffled:
        drawn = random.Random(number)
        for record in records:
            words = record["answer"].split()
            drawn.shuffle(words)
            record["answer"] = " ".join(words)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def _recipe(places: Places, files: Mapping[str, Path], rule: str, bad: int) -> Recipe:
    listed = f"[{', '.join(str(path.absolute()) for path in files.values())}]"
    named = f"{{{', '.join(f'{name}: {path.absolute()}' for name, path in files.items())}}}"
    return parse_recipe(
        f"model: {{name_or_path: base}}\n{_RECIPE}",
        source="poisoned sites",
        overrides=[
            f"model.name_or_path={places.model}",
            f"data.train={listed}",
            f"simulation.sites={named}",
            f"training.seed={SEED}",
            f"aggregation.rule={rule}",
            f"aggregation.multi_krum.poisoned={bad}",
        ],
    )


def _printed(table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    printed = Table(title="Held-out loss of the honest sites (nats per token)", title_justify="left", box=None)
    for column in ("", "attack, poisoned", *RULES):
        printed.add_column(column, no_wrap=True)
    for sites, rows in table.items():
        for attack, row in rows.items():
            printed.add_row(sites, attack, *(f"{row[rule]:.3f}" for rule in RULES))
    return printed
