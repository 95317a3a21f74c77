"""From a recipe's data section to tokenised training rows and held-out examples, in memory or in a store on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core_training.data.examples import Example, Row
from core_training.data.formats import known_columns
from core_training.data.mixing import mixed
from core_training.data.records import Record, content_digest, data_files
from core_training.data.rows import pack
from core_training.data.token_store import TokenStore, TokenWriter, open_store
from core_training.engine.tokenising import Outcome, identity_digest, tokenised_records, training_files
from core_training.foundation.errors import InputError
from core_training.foundation.trainable import DataReport
from core_training.models.context import context_length
from core_training.recipe.schema import Recipe
from core_training.stages.base import Stage

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Units:
    """Whose the training rows are, as numbers from 0 up: `of_rows`; `count` is of all units, also of those without."""

    of_rows: npt.NDArray[np.int64]
    count: int


@dataclass(frozen=True)
class Dataset:
    """The training and evaluation data of one engine. `training_sources` counts examples by source, like `evaluation`.

    `units` is whose each row is, as a number, where differential privacy hides whose rows are trained on. Rows are read
    from disk when they are asked for where the recipe has a `data.cache`.
    """

    rows: Sequence[Row]
    training_sources: dict[str, int]
    evaluation: dict[str, Sequence[Row]]
    report: DataReport
    units: Units | None = None


def load_dataset(recipe: Recipe, stage: Stage[Any], records: Sequence[Record] | None = None) -> Dataset:
    """Read and tokenise `data.train` (or `records` in its place) and `data.eval`.

    A training record that stands in `data.eval` too, in whatever layout, is left out. Where `training.packing` is
    unset, examples share rows if stage and model can. Raises InputError when there is nothing to train on, for any
    record that does not fit the stage or the model, and for packing that the model cannot do.
    """
    _check_columns(recipe)
    packs = _packs(recipe, stage)
    examples: Sequence[Example]
    parts: npt.NDArray[np.int32]
    if recipe.data.cache is None:
        kept: list[Example] = []
        numbers: list[int] = []
        owners: list[int] = []
        outcome = Outcome()
        for example, part, owner in _examples(recipe, stage, records, outcome):
            kept.append(example)
            numbers.append(part)
            owners.append(owner)
        examples, parts = kept, np.array(numbers, dtype=np.int32)
        if recipe.privacy.hides_units:
            return _arranged(recipe, stage, examples, parts, outcome, owners=np.array(owners, dtype=np.int64))
    else:

        def write(writer: TokenWriter) -> dict[str, Any]:
            outcome = Outcome()
            for example, part, _ in _examples(recipe, stage, records, outcome):
                writer.append(example, part)
            return asdict(outcome)

        store = open_store(Path(recipe.data.cache) / _digest(recipe, stage, records), write)
        examples, parts, outcome = store, store.parts, Outcome(**store.notes)
    return _arranged(recipe, stage, examples, parts, outcome, packs=packs)


def _check_columns(recipe: Recipe) -> None:
    """Raise InputError when `data.columns` names a column that the stage does not have."""
    known = known_columns(recipe.stage)
    for name in recipe.data.columns:
        if name not in known:
            raise InputError(
                f"data.columns.{name}: stage {recipe.stage} has no such column; write one of its own "
                f"({', '.join(known)}), then the name it has in the files"
            )


def _packs(recipe: Recipe, stage: Stage[Any]) -> bool:
    """Whether examples share rows. Raises InputError where they are to and the model would not keep them apart."""
    packing, able = recipe.training.packing, stage.base.keeps_examples_apart
    if packing and not able:
        kind = stage.base.model.config.model_type
        raise InputError(
            f"training.packing: models of type {kind} do not keep examples that share a row apart; "
            "set it to false, or leave it out"
        )
    return able if packing is None else packing


class NothingToTrainError(InputError):
    """None of the records is left to train on: they are held out, or have nothing to learn from."""


def _examples(
    recipe: Recipe, stage: Stage[Any], records: Sequence[Record] | None, outcome: Outcome
) -> Iterator[tuple[Example, int, int]]:
    """All examples, each with the numbers of its part and of whose it is; those with nothing to learn are left out."""
    numbers: dict[tuple[bool, str], int] = {}
    owners: dict[str, int] = {}
    records_so_far = count()
    for one in tokenised_records(recipe, stage, records, outcome):
        part = (one.held_out, one.record.source)
        if part not in numbers:
            numbers[part] = len(outcome.parts)
            outcome.parts.append(part)
        owner = next(records_so_far) if one.unit is None else owners.setdefault(one.unit, len(owners))
        for example in one.useful:
            yield example, numbers[part], owner


def _arranged(
    recipe: Recipe,
    stage: Stage[Any],
    examples: Sequence[Example],
    parts: npt.NDArray[np.int32],
    outcome: Outcome,
    *,
    packs: bool = False,
    owners: npt.NDArray[np.int64] | None = None,
) -> Dataset:
    """The examples as rows, by part; where `packs` is true, those that train share rows.

    `owners` says whose each one is, where differential privacy goes by it.
    """
    held_out = np.array([part[0] for part in outcome.parts], dtype=bool)
    chosen, apart = (np.flatnonzero(held_out[parts] == out) for out in (False, True))
    chosen = _mixed(recipe, chosen, parts, outcome)
    training = _Selected(examples, chosen)
    for warning in outcome.warnings():
        _log.warning("%s", warning)
    # Whether a site has anything left to train on is not told where each record is hidden: it trains on noise then.
    if not len(training) and (owners is None or recipe.topology.kind == "central"):
        raise NothingToTrainError(_nothing_to_train(recipe, outcome, len(examples)))
    stage.check(training)
    room = min(recipe.training.max_length, context_length(stage.base.model))  # the padding counts on from the last one
    sources = {i: source for i, (_, source) in enumerate(outcome.parts)}
    dropped = outcome.dropped + outcome.skipped
    units = None
    if owners is not None:
        units = Units(np.unique(owners[chosen], return_inverse=True)[1], outcome.units)
    return Dataset(
        rows=_Rows(training, pack(training.lengths, room)) if packs else _Rows(training),
        training_sources={sources[i]: number for i, number in _counts(parts[chosen]).items()},
        evaluation={sources[i]: _Rows(_Selected(examples, np.flatnonzero(parts == i))) for i in _counts(parts[apart])},
        report=DataReport(len(training), len(apart), outcome.truncated, dropped, outcome.units),
        units=units,
    )


def _counts(parts: npt.NDArray[np.int32]) -> dict[int, int]:
    """The number of examples of each part that has any."""
    return {int(part): int(number) for part, number in zip(*np.unique(parts, return_counts=True), strict=True)}


def _mixed(
    recipe: Recipe, training: npt.NDArray[np.int64], parts: npt.NDArray[np.int32], outcome: Outcome
) -> npt.NDArray[np.int64]:
    """Those of the training examples that `data.mix` keeps; how many it leaves out is said."""
    if not recipe.data.mix or not len(training):
        return training
    kept = mixed([outcome.parts[part][1] for part in parts[training]], recipe.data.mix, recipe.training.seed)
    if len(kept) < len(training):
        _log.warning("data.mix: %d of %d training examples are kept, the others left out", len(kept), len(training))
    return training[kept]


class _Selected(Sequence[Example]):
    """Some of the examples."""

    def __init__(self, examples: Sequence[Example], chosen: npt.NDArray[np.int64]) -> None:
        self._examples = examples
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Selected(self._examples, self._chosen[index])
        return self._examples[int(self._chosen[index])]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        if isinstance(self._examples, TokenStore):
            return list(self._examples.lengths[self._chosen].tolist())
        return [len(example) for example in self]


class _Rows(Sequence[Row]):
    """The examples in rows: in groups of these numbers, or one by one."""

    def __init__(self, examples: Sequence[Example], groups: Sequence[Sequence[int]] | None = None) -> None:
        self._examples = examples
        self._groups = groups

    def __len__(self) -> int:
        return len(self._examples) if self._groups is None else len(self._groups)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if self._groups is None:
            return (self._examples[index],)
        return tuple(self._examples[i] for i in self._groups[index])


_STORE_VERSION = 4
"""Raise it with any change of the tokens that a record becomes, or of what is held out."""


def _digest(recipe: Recipe, stage: Stage[Any], records: Sequence[Record] | None) -> str:
    """SHA-256 (hex) over all that decides what is in a store."""
    import tokenizers
    import transformers

    fraction = None if recipe.data.eval is not None else recipe.data.eval_fraction
    rollout = recipe.rollout.model_dump() if recipe.stage_part.samples else None
    data = recipe.data.model_dump(include={"columns", "on_error", "reasoning", "loss_on", "max_samples", "unknown"})
    cut = [recipe.training.max_length, stage.truncation]
    settings = [recipe.stage, data, fraction, cut, rollout, stage.further_columns]
    versions = [_STORE_VERSION, transformers.__version__, tokenizers.__version__, stage.base.chat_template.digest]
    versions.append(stage.base.vocabulary_digest)
    hasher = hashlib.sha256(json.dumps([settings, versions], sort_keys=True).encode())
    for path in sorted(stage.base.folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".model", ".txt"):  # the tokenizer, and what its model takes
            hasher.update(content_digest(path))
    if records is None:
        for path in training_files(recipe):
            hasher.update(content_digest(path))
    else:
        for record in records:
            hasher.update(identity_digest({record.source: record.fields}))
    hasher.update(b"evaluation")
    for path in [] if recipe.data.eval is None else data_files(recipe.data.eval):
        hasher.update(content_digest(path))
    return hasher.hexdigest()


def _nothing_to_train(recipe: Recipe, outcome: Outcome, held_out: int) -> str:
    if outcome.records == 0:
        return f"data.train: {recipe.data.train} holds no record"
    files = ", ".join(sorted(outcome.files))
    if outcome.skipped == outcome.records:
        return f"data.train: all {outcome.records} records are skipped; the first: {outcome.first_error}"
    if outcome.dropped + outcome.skipped == outcome.records:
        return (
            f"data.train: none of the {outcome.records} records of {files} has a token to learn within "
            f"training.max_length ({recipe.training.max_length}); raise it"
            + ("" if recipe.data.eval is None else ", or keep the records of data.eval out of data.train")
        )
    return (
        f"data.train: all {held_out} usable examples of {files} are held out for evaluation; "
        "give more records, or set data.eval_fraction: 0"
    )
