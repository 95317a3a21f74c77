"""From a recipe's data section to tokens: one record after the other, with what became of all of them.

The held-out part is chosen by a hash of each record's content: the same record is held out at every site count, in
every topology, and a copy of it elsewhere is held out too, in whatever layout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from core_training.data.examples import Example
from core_training.data.folding import folded
from core_training.data.formats import read_values
from core_training.data.reasoning import with_reasoning
from core_training.data.records import OnError, Record, data_files, records_in
from core_training.data.unknown import without_unused
from core_training.foundation.errors import InputError
from core_training.models.context import UNLIMITED, context_length
from core_training.parts.data_kinds import TEXT
from core_training.parts.data_kinds.values import Values
from core_training.recipe.schema import Recipe
from core_training.stages.base import Stage


@dataclass
class Outcome:
    """The fate of the records. `parts` are the data's parts in order of their numbers: (held out, source)."""

    records: int = 0
    truncated: int = 0
    dropped: int = 0
    copies: int = 0
    """Training records that stand in `data.eval` too; they are among the dropped."""
    open_ended: int = 0
    folded: int = 0
    skipped: int = 0
    first_error: str = ""
    unused: dict[str, int] = field(default_factory=dict)
    """Parts that were left out under `data.unknown: warn`: in how many records each."""
    files: dict[str, None] = field(default_factory=dict)
    parts: list[tuple[bool, str]] = field(default_factory=list)

    def skip(self, reason: InputError) -> None:
        """Count a record that cannot be used."""
        self.skipped += 1
        self.first_error = self.first_error or str(reason)

    def skip_line(self, reason: InputError) -> None:
        """Count a line that is no record."""
        self.records += 1
        self.skip(reason)


@dataclass(frozen=True)
class Tokenised:
    """A record as tokens: `whole`, and what `training.max_length` leaves of it (nothing, one example or several)."""

    record: Record
    held_out: bool
    whole: Example
    useful: list[Example]
    truncated: bool


def tokenised_records(
    recipe: Recipe, stage: Stage[Any], records: Sequence[Record] | None, outcome: Outcome
) -> Iterator[Tokenised]:
    """All records of the recipe's data (or `records` in place of `data.train`) as tokens, one at a time.

    Copies of held-out records are left out, and `outcome` counts what became of all. Raises InputError for a record
    that does not fit the stage or the model, unless `data.on_error` has it skipped.
    """
    fraction = recipe.data.eval_fraction if recipe.data.eval is None else 0.0
    on_error = outcome.skip_line if recipe.data.on_error == "skip" else None
    # A stage that samples looks itself at what prompt and answer come to.
    most = UNLIMITED if recipe.stage_part.samples else context_length(stage.base.model)
    kept_for_evaluation: set[bytes] = set()
    for held_out, record in chain(
        ((True, record) for record in _records_of(recipe, recipe.data.eval or [], on_error)),
        ((False, record) for record in (training_records(recipe, on_error) if records is None else records)),
    ):
        outcome.records += 1
        outcome.files[str(record.path)] = None
        try:
            values = read_values(_usable(recipe, record, outcome), recipe.stage, recipe.data.columns)
            if held_out:
                kept_for_evaluation.add(identity_digest(values.identity))
            elif kept_for_evaluation and identity_digest(values.identity) in kept_for_evaluation:
                outcome.dropped += 1
                outcome.copies += 1
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
            outcome.skip(error)
            continue
        truncated = stage.is_truncated(whole, recipe.training.max_length)
        outcome.truncated += truncated
        outcome.folded += said is not thought
        outcome.dropped += not useful
        if not recipe.stage_part.samples:
            outcome.open_ended += not all(tokens.ends_with(stage.base.end_tokens) for tokens in whole.sequences)
        yield Tokenised(record, held_out or is_held_out(values.identity, fraction), whole, useful, truncated)


def _usable(recipe: Recipe, record: Record, outcome: Outcome) -> Record:
    """The record, under `data.unknown: warn` without what cannot be used, which is counted."""
    if recipe.data.unknown == "stop" or recipe.stage_part.reads is TEXT:
        return record
    fields, left_out = without_unused(record.fields, recipe.data.columns.values())
    for name in left_out:
        outcome.unused[name] = outcome.unused.get(name, 0) + 1
    return replace(record, fields=fields) if left_out else record


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


def is_held_out(identity: Mapping[str, Any], fraction: float) -> bool:
    """Whether a record that says this (see `Values.identity`) belongs to the evaluation part."""
    return int.from_bytes(identity_digest(identity)[:8], "big") < fraction * 2**64


def identity_digest(identity: Mapping[str, Any]) -> bytes:
    """SHA-256 over what makes two records one."""
    content = json.dumps(identity, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
    return hashlib.sha256(content).digest()


def training_records(recipe: Recipe, on_error: OnError | None = None) -> Iterator[Record]:
    """The records of `data.train`; without it those of all simulated sites, as if they were one."""
    return _records_of(recipe, _training_patterns(recipe), on_error)


def _records_of(recipe: Recipe, patterns: str | list[str], on_error: OnError | None) -> Iterator[Record]:
    return records_in(patterns, recipe.data.max_samples, on_error)


def training_files(recipe: Recipe) -> list[Path]:
    """The files of those records."""
    return data_files(_training_patterns(recipe))


def _training_patterns(recipe: Recipe) -> str | list[str]:
    if recipe.data.train is not None:
        return recipe.data.train
    sites = recipe.simulation.sites
    if sites is None:
        raise InputError("data.train: name the training files")
    return sites if isinstance(sites, list) else list(sites.values())
