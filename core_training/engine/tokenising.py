"""From a recipe's data section to tokens: one record after the other, with what became of all of them.

The held-out part is chosen by a hash of each record's content: the same record is held out at every site count, in
every topology, and a copy of it elsewhere is held out too, in whatever layout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from core_training.data.examples import Example
from core_training.data.folding import folded, unwrapped
from core_training.data.formats import read_values
from core_training.data.reasoning import with_reasoning, with_thoughts_apart
from core_training.data.records import OnError, Record, data_files, records_in
from core_training.data.unknown import without_unused
from core_training.foundation.errors import InputError
from core_training.foundation.processes import in_processes
from core_training.models.context import UNLIMITED, context_length
from core_training.models.tokenizer_trial import is_panic
from core_training.parts.data_kinds import TEXT
from core_training.parts.data_kinds.values import Values
from core_training.recipe.differential_privacy import EACH_RECORD
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
    units: int = 0
    """Those that differential privacy hides: of all records that were read for training, whatever became of them."""
    files: dict[str, None] = field(default_factory=dict)
    parts: list[tuple[bool, str]] = field(default_factory=list)

    def warnings(self) -> Iterator[str]:
        """What a person should know of the records' fate, a sentence each."""
        of_all = f"of {self.records} records"
        if self.skipped:
            yield f"data.on_error: {self.skipped} {of_all} are skipped; the first: {self.first_error}"
        if self.unused:
            said = ", ".join(f"{name} (in {count})" for name, count in self.unused.items())
            yield f"data.unknown: {of_all} these parts are left out: {said}"
        if self.copies:
            yield f"data: {self.copies} training records stand in data.eval too, and are left out of training"
        if self.folded:
            yield (
                f"data: in {self.folded} {of_all} a system text stands at the beginning of the user's words, a "
                "speaker's turns in a row are one, or tools and their results are written once: the chat template "
                "takes no others (model.chat_template)"
            )
        if self.open_ended:
            yield (
                f"data: {self.open_ended} {of_all} are learnt without a token that ends an answer, and teach the model "
                "not to stop; take a chat template that closes the assistant's turn with one, as {{ eos_token }} "
                "(model.chat_template), or make what closes it a token (model.add_tokens)"
            )

    def add(self, one: Tokenised) -> None:
        """Count a record that became tokens."""
        self.truncated += one.truncated
        self.dropped += not one.useful
        self.folded += one.folded
        self.open_ended += one.open_ended
        for name in one.unused:
            self.unused[name] = self.unused.get(name, 0) + 1

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
    identity: bytes
    """SHA-256 over what makes two records one."""
    folded: bool
    open_ended: bool
    unused: list[str]
    unit: str | None
    """Whose record it is, where a column says so and differential privacy goes by it."""


Source = tuple[bool, Record]
"""A record, and whether it is one of `data.eval`."""


def tokenised_records(
    recipe: Recipe, stage: Stage[Any], records: Sequence[Record] | None, outcome: Outcome, *, processes: int = 1
) -> Iterator[Tokenised]:
    """All records of the recipe's data (or `records` in place of `data.train`) as tokens, one at a time.

    Copies of held-out records are left out, and `outcome` counts what became of all. Raises InputError for a record
    that does not fit the stage or the model, unless `data.on_error` has it skipped.
    """
    on_error = outcome.skip_line if recipe.data.on_error == "skip" else None
    sources: Iterator[Source] = chain(
        ((True, record) for record in _records_of(recipe, recipe.data.eval or [], on_error)),
        ((False, record) for record in (training_records(recipe, on_error) if records is None else records)),
    )
    kept_for_evaluation: set[bytes] = set()
    read = _Reader(recipe, stage)
    if recipe.privacy.hides_units:
        sources = _counted(sources, recipe, outcome)
    for one in in_processes(read, sources, processes):
        outcome.records += 1
        if isinstance(one, InputError):
            if recipe.data.on_error == "stop":
                raise one
            outcome.skip(one)
            continue
        outcome.files[str(one.record.path)] = None
        if recipe.data.eval is not None and one.held_out:
            kept_for_evaluation.add(one.identity)
        elif one.identity in kept_for_evaluation:
            outcome.dropped += 1
            outcome.copies += 1
            continue
        outcome.add(one)
        yield one


def _counted(sources: Iterator[Source], recipe: Recipe, outcome: Outcome) -> Iterator[Source]:
    """Count whose the records for training are, before anything is done to them.

    Their number is told to others, who choose what a recipe does: how many it holds out, or leaves out as too short,
    would tell of single records.
    """
    owners: set[str] = set()
    for is_evaluation, record in sources:
        if not is_evaluation:
            whose = None
            with suppress(InputError):  # it is told where the record is read
                whose = _unit(recipe, record)
            outcome.units += whose not in owners
            if whose is not None:
                owners.add(whose)
        yield is_evaluation, record


@dataclass(frozen=True)
class _Reader:
    """A function from records to their tokens, or to what is wrong with them; one record knows nothing of others."""

    recipe: Recipe
    stage: Stage[Any]

    def __call__(self, source: Source) -> Tokenised | InputError:
        try:
            return self._tokenised(*source)
        except InputError as error:
            return error
        except BaseException as error:
            if not is_panic(error):
                raise
            return InputError(f"{source[1].place}: the model's tokenizer gives this text up; its rules do not end")

    def _tokenised(self, is_evaluation: bool, record: Record) -> Tokenised:  # noqa: FBT001
        recipe, stage = self.recipe, self.stage
        unit = _unit(recipe, record)
        usable, unused = _usable(recipe, record)
        values = read_values(usable, recipe.stage, recipe.data.columns)
        thought = _with_reasoning(recipe, record, values)
        if (apart := with_thoughts_apart(thought)) is not thought and stage.base.chat_template.takes_thoughts:
            thought = apart
        said = _folded(stage, thought)
        whole = stage.tokenise(record, said)
        for tokens in whole.sequences:
            stage.base.check_tokens(tokens.input_ids, record.place)
        useful = stage.cut(whole, recipe.training.max_length)
        _check_lengths(recipe, stage, record, useful)
        identity = identity_digest(values.identity)
        fraction = recipe.data.eval_fraction if recipe.data.eval is None else 0.0
        ends = stage.base.end_tokens
        return Tokenised(
            record,
            held_out=is_evaluation or _below(identity, fraction),
            whole=whole,
            useful=useful,
            truncated=stage.is_truncated(whole, recipe.training.max_length),
            identity=identity,
            folded=said is not thought,
            open_ended=not recipe.stage_part.samples and not all(tokens.ends_with(ends) for tokens in whole.sequences),
            unused=unused,
            unit=unit,
        )


def _unit(recipe: Recipe, record: Record) -> str | None:
    """Whose the record is, by the column that the recipe names. Raises InputError for a record that does not say."""
    terms = recipe.privacy.differential_privacy
    if terms is None or terms.of_sites or terms.unit == EACH_RECORD:
        return None
    whose = record.fields.get(terms.unit)
    if whose is None or isinstance(whose, dict | list) or not str(whose).strip():
        raise InputError(
            f"{record.place}: column '{terms.unit}' does not say whose this record is, which "
            "privacy.differential_privacy.unit goes by; fill it in, name another column, or set unit: record"
        )
    return str(whose).strip()


def _usable(recipe: Recipe, record: Record) -> tuple[Record, list[str]]:
    """The record, under `data.unknown: warn` without what cannot be used, and the names of that."""
    if recipe.data.unknown == "stop" or recipe.stage_part.reads is TEXT:
        return record, []
    fields, left_out = without_unused(record.fields, recipe.data.columns.values())
    return replace(record, fields=fields) if left_out else record, left_out


def _with_reasoning(recipe: Recipe, record: Record, values: Values) -> Values:
    try:
        return with_reasoning(values, recipe.data.reasoning)
    except ValueError as error:
        raise InputError(f"{record.place}: {error}") from None


def _folded(stage: Stage[Any], values: Values) -> Values:
    """The values with the turns that the chat template takes."""
    template = stage.base.chat_template
    # The template is asked only of records that have such turns: most have none.
    if (plain := unwrapped(values)) is not values and template.wraps_results:
        values = plain
    if folded(values, system=True, repeats=True) is values or not template.exists:
        return values
    return folded(values, system=not template.takes_system, repeats=not template.takes_repeats)


def _check_lengths(recipe: Recipe, stage: Stage[Any], record: Record, examples: Sequence[Example]) -> None:
    """Raise InputError for more tokens than the model was built to look at in one piece."""
    # A stage that samples looks itself at what prompt and answer come to.
    most = UNLIMITED if recipe.stage_part.samples else context_length(stage.base.model)
    longest = max((len(tokens) for example in examples for tokens in example.sequences), default=0)
    if longest > most:
        raise InputError(
            f"{record.place}: {longest} tokens, within training.max_length ({recipe.training.max_length}), "
            f"are more than the model was built for (max_position_embeddings {most}); lower it to {most}"
        )


def is_held_out(identity: Mapping[str, Any], fraction: float) -> bool:
    """Whether a record that says this (see `Values.identity`) belongs to the evaluation part."""
    return _below(identity_digest(identity), fraction)


def _below(digest: bytes, fraction: float) -> bool:
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


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
