"""A reader of the flat YAML files of other tools, key by key, to which no key is lost."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from core_training.foundation.bounded_reading import MOST_YAML_BYTES, parse_json, shortened, shortened_text
from core_training.foundation.errors import InputError
from core_training.recipe.optimisation import NO_SHARE

_log = logging.getLogger(__name__)


class FlatReader:
    """A reader that takes a flat YAML's keys one by one, and knows which were not taken."""

    def __init__(self, document: Mapping[str, Any], source: str, whose: str) -> None:
        """`source` names the file in messages, `whose` the tool that it is of."""
        self.source = source
        self._whose = whose
        self._document = document
        self._taken: set[str] = set()
        self._refused: list[str] = []
        self._notes: list[str] = []

    def given(self, key: str) -> bool:
        return self._document.get(key) is not None

    def text(self, key: str, default: Any) -> Any:
        return self._value(key, default, "a text", _text)

    def whole(self, key: str, default: Any) -> Any:
        return self._value(key, default, "a whole number", _whole)

    def steps(self, key: str, default: Any) -> Any:
        """A number of steps that is no share of all of them."""
        return self._value(key, default, NO_SHARE, _whole)

    def steps_or_share(self, key: str, default: int) -> int | float:
        """A number of steps or, below 1, a share of all of them, as transformers reads it."""
        found: int | float = self._value(key, default, "a whole number, or a share below 1", _whole_or_share)
        return found

    def number(self, key: str, default: float) -> float:
        return float(self._value(key, default, "a number", _number))

    def switch(self, key: str, *, default: bool) -> bool:
        return bool(self._value(key, default, "true or false", _switch))

    def mapping(self, key: str) -> dict[str, Any] | None:
        """Names with values, as they are."""
        found: dict[str, Any] | None = self._value(key, None, "names with values", _mapping)
        return found

    def arguments(self, key: str) -> str | None:
        """`NAME=VALUE` with commas between, which may be given as names with values."""
        found: str | None = self._value(key, None, "NAME=VALUE with commas between", _arguments)
        return found

    def choice(self, key: str, values: tuple[Any, ...], default: Any) -> Any:
        """One of these values."""

        def chosen(value: Any) -> Any:
            if value not in values:
                raise ValueError
            return value

        return self._value(key, default, f"one of {', '.join(map(str, values))}", chosen)

    def records(self, key: str) -> list[dict[str, Any]]:
        """A list of names with values."""
        return list(self._value(key, [], "a list of names with values", _records))

    def names(self, key: str) -> list[str]:
        """A list, or a text with commas."""
        return list(self._value(key, [], "names with commas between", _names))

    def one_of(self, key: str, meanings: Mapping[str, str], default: str) -> str:
        value = self.text(key, default)
        if value not in meanings:
            raise InputError(
                f"{self.source}: {key}: {shortened(value)} has no counterpart here; it can be {', '.join(meanings)}"
            )
        return meanings[value]

    def refuse(self, key: str, right: str) -> None:
        self._refused.append(f"{key}: {_shown(self._document.get(key))} (here: {right})")

    def say(self, note: str) -> None:
        self._notes.append(note)

    def finish(self, when_off: Mapping[str, Any], without_effect: re.Pattern[str]) -> None:
        """Account for the keys that were not taken.

        Those in `when_off` have no counterpart, and ask for nothing at the value there; those that match
        `without_effect` change nothing in what is learnt. Raises InputError naming all others; says the rest.
        """
        idle = []
        for key, value in self._document.items():
            if key in self._taken or value is None:
                continue
            if key in when_off:
                if not _same(value, when_off[key]):
                    self._refused.append(f"{key}: {_shown(value)}")
            elif without_effect.match(str(key)):
                idle.append(shortened_text(key, 60))
            else:
                self._refused.append(shortened_text(key, 60))
        if self._refused:
            raise InputError(
                f"{self.source}: {self._whose} keys that change the training and have no counterpart here: "
                f"{shortened_text('; '.join(self._refused), 1500)}. Take them out, or write a recipe (docs/recipe.md)"
            )
        if idle:
            self._notes.append(f"without effect here: {', '.join(idle)}")
        if self._notes:
            _log.warning("%s: %s's keys. %s", self.source, self._whose, shortened_text("; ".join(self._notes), 1500))

    def _value(self, key: str, default: Any, wanted: str, parse: Callable[[Any], Any]) -> Any:
        self._taken.add(key)
        value = self._document.get(key)
        if value is None:
            return default
        try:
            return parse(value)
        except (TypeError, ValueError):
            raise InputError(f"{self.source}: {key}: must be {wanted}, not {shortened(value)}") from None


def rows_in_twos(training: dict[str, Any], read: FlatReader, key: str) -> None:
    """Have rows come in twos where the objective compares a batch's rows; as many make a step as before.

    `key` is what the file calls the rows of a batch.
    """
    batches = training["gradient_accumulation_steps"]
    if training["per_device_train_batch_size"] == 1 and batches % 2 == 0:
        training |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": batches // 2}
        read.say(f"{key}: kto compares a batch's rows, so 1 × {batches} is 2 × {batches // 2}")


def _shown(value: Any) -> str:
    return shortened_text(value, 100) if isinstance(value, str) else shortened(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _whole(value: Any) -> int:
    if (number := _number(value)) != int(number):
        raise ValueError
    return int(number)


def _whole_or_share(value: Any) -> int | float:
    number = _number(value)
    return number if 0 < number < 1 else _whole(value)


def _switch(value: Any) -> bool:
    return ("false", "true").index(str(value).lower()) == 1


def _names(value: Any) -> list[str]:
    names = value.split(",") if isinstance(value, str) else [_text(one) for one in value]
    return [name.strip() for name in names if name.strip()]


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        value = parse_json(value, MOST_YAML_BYTES)
    if not isinstance(value, dict):
        raise TypeError
    return value


def _arguments(value: Any) -> str:
    return value if isinstance(value, str) else ",".join(f"{name}={one}" for name, one in _mapping(value).items())


def _records(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise TypeError
    return [_mapping(entry) for entry in value]


def _same(value: Any, other: Any) -> bool:
    if isinstance(other, float):
        with suppress(TypeError, ValueError):
            return _number(value) == other
    return bool(value == other)
