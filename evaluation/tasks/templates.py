"""Items by templates: a prompt, choices and an answer made of a record's columns, as columns' names or in Jinja."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from core_training.data.records import Record
from core_training.data.turns import turn
from core_training.foundation.bounded_reading import parse_yaml, shortened, shortened_text
from core_training.foundation.errors import InputError
from evaluation.items import Item
from evaluation.tasks.formats import Draft, Reading, common_parts

_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Templates:
    """What items are made of. A text is a column's name or a Jinja template of the columns.

    `keys` are the names of prompt, choices and answer in the file that says them, for errors.
    """

    prompt: str
    choices: str | Sequence[str] | None = None
    answer: str | int | None = None
    system: str | None = None
    before: str = ""
    delimiter: str = " "
    keys: tuple[str, str, str] = ("prompt", "choices", "answer")
    is_counting: bool = False
    """Whether a number that a template of the answer writes is a choice's, and never a choice's text."""

    def draft(self, record: Record, reading: Reading) -> Draft:
        """An item of a record. Raises InputError where a template asks for what the record has not."""
        text = self.before + _text(self.prompt, record, self.keys[0])
        answer = self._answer(record)
        turns = [turn("system", self.system)] if self.system else []
        parts = common_parts(record, reading, ()) | {
            "prompt": [*turns, turn("user", text)],
            "plain": text,
            "bare": self._bare(record, text),
        }
        if self.choices is None:
            references = tuple(str(one) for one in (answer if isinstance(answer, list) else [answer]))
            has = self.answer is not None
            item = Item(**parts, delimiter=self.delimiter, references=references if has and answer is not None else ())
            return Draft(item, answer, has_label=has)
        choices = self._choices(record)
        alike = isinstance(self.choices, Sequence) and not isinstance(self.choices, str)
        labels = choices if alike else tuple(_LETTERS[: len(choices)])
        item = Item(**parts, delimiter=self.delimiter, choices=choices, labels=labels, references=choices)
        return Draft(item, answer, has_label=True, is_choice=True)

    def _bare(self, record: Record, text: str) -> str:
        """The longest text of the columns that the prompt is made of; a template's own words are those of all items."""
        names = (
            {self.prompt}
            if self.prompt in record.fields
            else find_undeclared_variables(_ENVIRONMENT.parse(self.prompt))
        )
        texts = [value for name in sorted(names) if isinstance(value := record.fields.get(name), str)]
        return max(texts, key=len, default=text.removeprefix(self.before))

    def _answer(self, record: Record) -> Any:
        if not isinstance(self.answer, str):
            return self.answer
        if self.answer in record.fields:
            return record.fields[self.answer]
        said = _rendered(self.answer, record, self.keys[2]).strip()
        return int(said) if self.is_counting and self.choices is not None and said.isdigit() else said

    def _choices(self, record: Record) -> tuple[str, ...]:
        found: Any = self.choices
        if isinstance(found, str):
            found = record.fields[found] if found in record.fields else _listed(_rendered(found, record, self.keys[1]))
        if isinstance(found, Mapping):
            found = list(found.values())
        if not isinstance(found, Sequence) or isinstance(found, str) or not 2 <= len(found) <= len(_LETTERS):
            raise InputError(f"{record.place}: {self.keys[1]} must be a list of 2 to 26 texts, not {shortened(found)}")
        return tuple(str(one) for one in found)


def _text(template: str, record: Record, key: str) -> str:
    if template in record.fields:
        value = record.fields[template]
        if not isinstance(value, str):
            raise InputError(f"{record.place}: {key}: column '{template}' must be a text, not {shortened(value)}")
        return value
    return _rendered(template, record, key)


def _rendered(template: str, record: Record, key: str) -> str:
    try:
        return _ENVIRONMENT.from_string(template).render(**record.fields)
    except TemplateError as error:
        raise InputError(
            f"{record.place}: {key}: {shortened_text(error, 200)}; its columns are {_columns(record)}"
        ) from None
    except Exception as error:  # an expression may raise anything
        raise InputError(f"{record.place}: {key}: {type(error).__name__}: {shortened_text(error, 200)}") from None


def _columns(record: Record) -> str:
    return ", ".join(record.fields) or "none"


def _listed(text: str) -> Any:
    """A list as a template writes it."""
    try:
        return parse_yaml(text)
    except ValueError:
        return text
