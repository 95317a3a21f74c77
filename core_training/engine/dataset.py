"""From a recipe's data section to tokenised training rows and held-out examples.

The held-out part is chosen by a hash of each record's content: the same record is held out at every site count, in
every topology, and a copy of it elsewhere is held out too, in whatever layout.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from core_training.data.examples import Example, Row
from core_training.data.folding import folded
from core_training.data.formats import known_columns, read_values
from core_training.data.reasoning import with_reasoning
from core_training.data.records import Record, content_digest, data_files, read_records
from core_training.data.rows import pack
from core_training.data.token_store import TokenStore, TokenWriter, open_store
from core_training.foundation.errors import InputError
from core_training.foundation.trainable import DataReport
from core_training.models.context import UNLIMITED, context_length
from core_training.parts.data_kinds.values import Values
from core_training.recipe.schema import Recipe
from core_training.stages.base import Stage

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """The training and evaluation data of one engine. `training_sources` counts examples by source, like `evaluation`.

    Rows are read from disk when they are asked for where the recipe has a `data.cache`.
    """

    rows: Sequence[Row]
    training_sources: dict[str, int]
    evaluation: dict[str, Sequence[Row]]
    report: DataReport


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
        outcome = Outcome()
        for example, part in _examples(recipe, stage, records, outcome):
            kept.append(example)
            numbers.append(part)
        examples, parts = kept, np.array(numbers, dtype=np.int32)
    else:

        def write(writer: TokenWriter) -> dict[str, Any]:
            outcome = Outcome()
            for example, part in _examples(recipe, stage, records, outcome):
                writer.append(example, part)
            return asdict(outcome)

        store = open_store(Path(recipe.data.cache) / _digest(recipe, stage, records), write)
        examples, parts, outcome = store, store.parts, Outcome(**store.notes)
    return _arranged(recipe, stage, examples, parts, outcome, packs=packs)


def is_held_out(identity: Mapping[str, Any], fraction: float) -> bool:
    """Whether a record that says this (see `Values.identity`) belongs to the evaluation part."""
    return int.from_bytes(_content_digest(identity)[:8], "big") < fraction * 2**64


def _content_digest(values: Mapping[str, Any]) -> bytes:
    content = json.dumps(values, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
    return hashlib.sha256(content).digest()


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


@dataclass
class Outcome:
    """The fate of the records. `parts` are the data's parts in order of their numbers: (held out, source)."""

    records: int = 0
    truncated: int = 0
    dropped: int = 0
    open_ended: int = 0
    folded: int = 0
    skipped: int = 0
    first_error: str = ""
    files: dict[str, None] = field(default_factory=dict)
    parts: list[tuple[bool, str]] = field(default_factory=list)

    def skip(self, reason: str) -> None:
        """Count a record that cannot be read."""
        self.skipped += 1
        self.first_error = self.first_error or reason


@dataclass(frozen=True)
class Tokenised:
    """A record as tokens: `whole`, and what `training.max_length` leaves of it (nothing, one example or several)."""

    record: Record
    held_out: bool
    whole: Example
    useful: list[Example]
    truncated: bool


def _examples(
    recipe: Recipe, stage: Stage[Any], records: Sequence[Record] | None, outcome: Outcome
) -> Iterator[tuple[Example, int]]:
    """All examples, each with the number of its part; those with nothing to learn from are left out."""
    numbers: dict[tuple[bool, str], int] = {}
    for one in tokenised_records(recipe, stage, records, outcome):
        part = (one.held_out, one.record.source)
        if part not in numbers:
            numbers[part] = len(outcome.parts)
            outcome.parts.append(part)
        for example in one.useful:
            yield example, numbers[part]


def tokenised_records(
    recipe: Recipe, stage: Stage[Any], records: Sequence[Record] | None, outcome: Outcome
) -> Iterator[Tokenised]:
    """All records of the recipe's data (or `records` in place of `data.train`) as tokens, one at a time.

    Copies of held-out records are left out, and `outcome` counts what became of all. Raises InputError for a record
    that does not fit the stage or the model, unless `data.on_error` has it skipped.
    """
    evaluating = _evaluation_files(recipe)
    fraction = 0.0 if evaluating else recipe.data.eval_fraction
    # A stage that samples looks itself at what prompt and answer come to.
    most = UNLIMITED if recipe.stage_part.samples else context_length(stage.base.model)
    kept_for_evaluation: set[bytes] = set()
    for held_out, record in chain(
        ((True, record) for path in evaluating for record in read_records(path)),
        ((False, record) for record in (_training_records(recipe) if records is None else records)),
    ):
        outcome.records += 1
        outcome.files[str(record.path)] = None
        try:
            values = read_values(record, recipe.stage, recipe.data.columns)
            if held_out:
                kept_for_evaluation.add(_content_digest(values.identity))
            elif kept_for_evaluation and _content_digest(values.identity) in kept_for_evaluation:
                outcome.dropped += 1
                continue
            thought = _with_reasoning(recipe, record, values)
            said = _folded(stage, thought)
            whole = stage.tokenise(record, said)
            for tokens in whole.sequences:
                stage.base.check_tokens(tokens.input_ids, record.place)
            useful = stage.cut(whole, recipe.training.max_length)
            _check_lengths(recipe, record, useful, most)
        except InputError as error:
            if recipe.data.on_error == "stop":
                raise
            outcome.skip(str(error))
            continue
        truncated = stage.is_truncated(whole, recipe.training.max_length)
        outcome.truncated += truncated
        outcome.folded += said is not thought
        outcome.dropped += not useful
        if not recipe.stage_part.samples:
            outcome.open_ended += not all(tokens.ends_with(stage.base.end_tokens) for tokens in whole.sequences)
        yield Tokenised(record, held_out or is_held_out(values.identity, fraction), whole, useful, truncated)


def _with_reasoning(recipe: Recipe, record: Record, values: Values) -> Values:
    try:
        return with_reasoning(values, recipe.data.reasoning)
    except ValueError as error:
        raise InputError(f"{record.place}: {error}") from None


def _folded(stage: Stage[Any], values: Values) -> Values:
    """The values with the turns that the chat template takes."""
    template = stage.base.chat_template
    if not template.exists:
        return values
    return folded(values, system=not template.takes_system, repeats=not template.takes_repeats)


def _check_lengths(recipe: Recipe, record: Record, examples: Sequence[Example], most: int) -> None:
    """Raise InputError for more tokens than the model was built to look at in one piece."""
    longest = max((len(tokens) for example in examples for tokens in example.sequences), default=0)
    if longest > most:
        raise InputError(
            f"{record.place}: {longest} tokens, within training.max_length ({recipe.training.max_length}), "
            f"are more than the model was built for (max_position_embeddings {most}); lower it to {most}"
        )


def _arranged(
    recipe: Recipe,
    stage: Stage[Any],
    examples: Sequence[Example],
    parts: npt.NDArray[np.int32],
    outcome: Outcome,
    *,
    packs: bool,
) -> Dataset:
    """The examples as rows, by part; where `packs` is true, those that train share rows."""
    held_out = np.array([part[0] for part in outcome.parts], dtype=bool)
    training = _Selected(examples, np.flatnonzero(~held_out[parts]))
    counts = dict(zip(*np.unique(parts, return_counts=True), strict=True))
    if outcome.skipped:
        _log.warning(
            "data.on_error: %d of %d records are skipped; the first: %s",
            outcome.skipped,
            outcome.records,
            outcome.first_error,
        )
    if not len(training):
        raise NothingToTrainError(_nothing_to_train(recipe, outcome, len(examples)))
    stage.check(training)
    if outcome.folded:
        _log.warning(
            "data: in %d of %d records a system text stands at the beginning of the user's words, or a speaker's turns "
            "in a row are one: the chat template takes no others (model.chat_template)",
            outcome.folded,
            outcome.records,
        )
    if outcome.open_ended:
        _log.warning(
            "data: %d of %d records are learnt without a token that ends an answer, and teach the model not to stop; "
            "take a chat template that closes the assistant's turn with one, as {{ eos_token }} (model.chat_template)",
            outcome.open_ended,
            outcome.records,
        )
    room = min(recipe.training.max_length, context_length(stage.base.model))  # the padding counts on from the last one
    return Dataset(
        rows=_Rows(training, pack(training.lengths, room)) if packs else _Rows(training),
        training_sources={
            source: int(counts[i]) for i, (out, source) in enumerate(outcome.parts) if not out and i in counts
        },
        evaluation={
            source: _Rows(_Selected(examples, np.flatnonzero(parts == i)))
            for i, (out, source) in enumerate(outcome.parts)
            if out and i in counts
        },
        report=DataReport(
            len(training), len(examples) - len(training), outcome.truncated, outcome.dropped + outcome.skipped
        ),
    )


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


def _training_files(recipe: Recipe) -> list[Path]:
    """The files of `data.train`; without it those of all simulated sites, as if they were one."""
    if recipe.data.train is not None:
        return data_files(recipe.data.train)
    sites = recipe.simulation.sites
    if sites is None:
        raise InputError("data.train: name the training files")
    return data_files(sites if isinstance(sites, list) else list(sites.values()))


def _training_records(recipe: Recipe) -> Iterator[Record]:
    return (record for path in _training_files(recipe) for record in read_records(path))


def _evaluation_files(recipe: Recipe) -> list[Path]:
    return [] if recipe.data.eval is None else data_files(recipe.data.eval)


_STORE_VERSION = 4
"""Raise it with any change of the tokens that a record becomes, or of what is held out."""


def _digest(recipe: Recipe, stage: Stage[Any], records: Sequence[Record] | None) -> str:
    """SHA-256 (hex) over all that decides what is in a store."""
    import tokenizers
    import transformers

    fraction = None if recipe.data.eval is not None else recipe.data.eval_fraction
    rollout = recipe.rollout.model_dump() if recipe.stage_part.samples else None
    data = recipe.data.model_dump(include={"columns", "on_error", "reasoning", "loss_on"})
    settings = [recipe.stage, data, fraction, recipe.training.max_length, rollout, stage.further_columns]
    versions = [_STORE_VERSION, transformers.__version__, tokenizers.__version__, stage.base.chat_template.digest]
    hasher = hashlib.sha256(json.dumps([settings, versions], sort_keys=True).encode())
    for path in sorted(stage.base.folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".model", ".txt"):  # the tokenizer, and what its model takes
            hasher.update(content_digest(path))
    if records is None:
        for path in _training_files(recipe):
            hasher.update(content_digest(path))
    else:
        for record in records:
            hasher.update(_content_digest({record.source: record.fields}))
    hasher.update(b"evaluation")
    for path in _evaluation_files(recipe):
        hasher.update(content_digest(path))
    return hasher.hexdigest()


def _nothing_to_train(recipe: Recipe, outcome: Outcome, held_out: int) -> str:
    if outcome.records == 0:
        return f"data.train: {recipe.data.train} holds no record"
    files = ", ".join(sorted(outcome.files))
    if outcome.skipped == outcome.records:
        return f"data.train: all {outcome.records} records of {files} are skipped; the first: {outcome.first_error}"
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
