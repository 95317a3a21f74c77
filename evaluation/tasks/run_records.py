"""The records of a run: those that it held out, and those that it was trained on, where they are at hand."""

from __future__ import annotations

from collections.abc import Iterator

from core_training.data.formats import read_values
from core_training.data.records import Record, records_in
from core_training.engine.tokenising import is_held_out, training_records
from core_training.foundation.errors import InputError
from core_training.recipe.schema import Recipe


def held_out_records(recipe: Recipe) -> Iterator[Record]:
    """The records that the run evaluated on. Raises InputError where its files are not here."""
    if recipe.data.eval is not None:
        yield from records_in(recipe.data.eval, recipe.data.max_samples)
        return
    for record in training_records(recipe):
        if _is_held_out(record, recipe):
            yield record


def trained_records(recipe: Recipe) -> Iterator[Record]:
    """The records that the run was trained on. Raises InputError where its files are not here."""
    for record in training_records(recipe):
        if recipe.data.eval is not None or not _is_held_out(record, recipe):
            yield record


def _is_held_out(record: Record, recipe: Recipe) -> bool:
    try:
        values = read_values(record, recipe.stage, recipe.data.columns)
    except InputError:
        if recipe.data.on_error == "skip":
            return False
        raise
    return is_held_out(values.identity, recipe.data.eval_fraction)
