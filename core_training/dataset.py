"""From a recipe's data section to tokenised training rows and held-out examples.

The held-out part is chosen by a hash of each record's content: the same record is held out at every site count, in
every topology, and a copy of it elsewhere is held out too.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from core_training.base_model import BaseModel
from core_training.errors import InputError
from core_training.recipe import Recipe
from core_training.records import Record, data_files, read_records
from core_training.rows import pack, row_of, truncate
from core_training.stages import STAGES
from core_training.stages.base import Example
from core_training.trainable import DataReport


@dataclass(frozen=True)
class Dataset:
    """What one engine trains and evaluates on. `training_sources` counts examples, by data source like `evaluation`."""

    rows: list[dict[str, list[int]]]
    training_sources: dict[str, int]
    evaluation: dict[str, list[Example]]
    report: DataReport


def stage_values(record: Record, recipe: Recipe) -> dict[str, Any]:
    """The stage's columns of a record. Raises InputError naming the record, the missing column and those it has."""
    stage = import_module(STAGES[recipe.stage])
    names = recipe.data.columns
    for columns in stage.columns:
        if all(names.get(c, c) in record.fields for c in columns):
            return {c: record.fields[names.get(c, c)] for c in columns}
    wanted = " or ".join("+".join(names.get(c, c) for c in columns) for columns in stage.columns)
    raise InputError(
        f"{record.place}: stage {recipe.stage} needs {wanted}; the record has {', '.join(record.fields) or 'nothing'}. "
        "Map names with data.columns"
    )


def _check_columns(recipe: Recipe) -> None:
    """Raises InputError when `data.columns` names a column that the stage does not have."""
    known = [name for columns in import_module(STAGES[recipe.stage]).columns for name in columns]
    for name in recipe.data.columns:
        if name not in known:
            raise InputError(
                f"data.columns.{name}: stage {recipe.stage} has no such column; write one of its own "
                f"({', '.join(known)}), then the name it has in the files"
            )


def is_held_out(values: dict[str, Any], fraction: float) -> bool:
    """Whether a record with these values belongs to the evaluation part."""
    return int.from_bytes(_content_digest(values)[:8], "big") < fraction * 2**64


def _content_digest(values: dict[str, Any]) -> bytes:
    content = json.dumps(values, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
    return hashlib.sha256(content).digest()


def _training_files(recipe: Recipe) -> list[Path]:
    """The files of `data.train`; without it those of all simulated sites, as if they were one."""
    if recipe.data.train is not None:
        return data_files(recipe.data.train)
    sites = recipe.simulation.sites
    if sites is None:
        raise InputError("data.train: name the training files")
    return data_files(sites if isinstance(sites, list) else list(sites.values()))


def load_dataset(recipe: Recipe, base: BaseModel, records: Iterable[Record] | None = None) -> Dataset:
    """Read and tokenise `data.train` (or `records` in its place) and `data.eval`.

    A training record that stands in `data.eval` too is left out. Raises InputError when there is nothing to train on,
    and for any record that does not fit the stage.
    """
    if records is None:
        records = (record for path in _training_files(recipe) for record in read_records(path))
    _check_columns(recipe)
    fraction = 0.0 if recipe.data.eval is not None else recipe.data.eval_fraction
    counts = _Counts()
    training: list[Example] = []
    training_sources: Counter[str] = Counter()
    evaluation: dict[str, list[Example]] = {}
    kept_for_evaluation: set[bytes] = set()
    if recipe.data.eval is not None:
        for record in (record for path in data_files(recipe.data.eval) for record in read_records(path)):
            values = stage_values(record, recipe)
            kept_for_evaluation.add(_content_digest(values))
            evaluation.setdefault(record.source, []).extend(_examples(record, values, recipe, base, counts))
    for record in records:
        values = stage_values(record, recipe)
        if kept_for_evaluation and _content_digest(values) in kept_for_evaluation:
            counts.dropped += 1
            counts.records += 1
            continue
        examples = _examples(record, values, recipe, base, counts)
        if is_held_out(values, fraction):
            evaluation.setdefault(record.source, []).extend(examples)
        else:
            training.extend(examples)
            training_sources[record.source] += len(examples)
    if not training:
        raise InputError(_nothing_to_train(recipe, counts, sum(map(len, evaluation.values()))))
    stage = import_module(STAGES[recipe.stage])
    packing = stage.packs_by_default if recipe.training.packing is None else recipe.training.packing
    groups = pack(training, recipe.training.max_length) if packing else [[i] for i in range(len(training))]
    return Dataset(
        rows=[row_of([training[i] for i in group]) for group in groups],
        training_sources=dict(training_sources),
        evaluation=evaluation,
        report=DataReport(len(training), sum(map(len, evaluation.values())), counts.truncated, counts.dropped),
    )


@dataclass
class _Counts:
    records: int = 0
    truncated: int = 0
    dropped: int = 0
    files: set[Path] = field(default_factory=set)


def _examples(
    record: Record, values: dict[str, Any], recipe: Recipe, base: BaseModel, counts: _Counts
) -> list[Example]:
    """The examples of one record, cut to `max_length`; those with nothing to learn are counted and left out."""
    stage = import_module(STAGES[recipe.stage])
    limit = recipe.training.max_length
    counts.records += 1
    counts.files.add(record.path)
    whole = stage.tokenise(record, values, base)
    length = len(whole.input_ids)
    if stage.splits_long_texts:
        parts = [Example(whole.input_ids[i : i + limit], whole.labels[i : i + limit]) for i in range(0, length, limit)]
    else:
        counts.truncated += length > limit
        parts = [truncate(whole, limit)]
    useful = [part for part in parts if part.loss_tokens > 0]
    counts.dropped += not useful
    return useful


def _nothing_to_train(recipe: Recipe, counts: _Counts, held_out: int) -> str:
    if counts.records == 0:
        return f"data.train: {recipe.data.train} holds no record"
    files = ", ".join(str(path) for path in sorted(counts.files))
    if counts.dropped == counts.records:
        return (
            f"data.train: none of the {counts.records} records of {files} has a token to learn within "
            f"training.max_length ({recipe.training.max_length}); raise it"
            + ("" if recipe.data.eval is None else ", or keep the records of data.eval out of data.train")
        )
    return (
        f"data.train: all {held_out} usable examples of {files} are held out for evaluation; "
        "give more records, or set data.eval_fraction: 0"
    )
