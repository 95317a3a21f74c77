"""The keys that a search varies: numbers between two bounds or choices, some of them only beside values of others.

Knows nothing of what proposes the values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from core_training.foundation.bounded_reading import shortened
from core_training.foundation.errors import InputError
from core_training.foundation.strict_json import strict_json
from core_training.recipe.key_types import type_of
from experiments.documents import check_keys, mapping_at, nearest

Kind = Literal["float", "int", "categorical"]
_KEYS = ("type", "low", "high", "step", "log", "choices", "when")


@dataclass(frozen=True)
class SearchedKey:
    """A key of the recipe and the values that it may have.

    `low` to `high` (with both ends), on a logarithmic scale where `log`, in steps of `step`; or `choices`. `when` has
    the values of earlier keys beside which it is varied; beside others it stays as the recipe has it.
    """

    name: str
    kind: Kind
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    choices: tuple[Any, ...] = ()
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def applies(self, values: Mapping[str, Any]) -> bool:
        """Whether it is varied beside these values of earlier keys."""
        return all(name in values and values[name] in allowed for name, allowed in self.when.items())

    @property
    def labels(self) -> tuple[str, ...]:
        """The choices as texts, in their order."""
        return tuple(choice if isinstance(choice, str) else strict_json(choice) for choice in self.choices)

    @property
    def extremes(self) -> tuple[Any, ...]:
        """The values that show whether the recipe takes the key: every choice, or both bounds."""
        return self.choices if self.kind == "categorical" else tuple(map(self.number, (self.low, self.high)))

    @property
    def grid(self) -> tuple[Any, ...]:
        """All its values, where they can be counted; else InputError."""
        if self.kind == "categorical":
            return self.choices
        step = self.step or (1 if self.kind == "int" and not self.log else None)
        if step is None:
            raise InputError(f"keys.{self.name}: a grid needs its values: give step, or choices")
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        return tuple(self.number(self.low + index * step) for index in range(count))

    def number(self, value: float) -> int | float:
        """A value as the recipe has it."""
        return round(value) if self.kind == "int" else float(value)


def parse_keys(document: Mapping[str, Any]) -> tuple[SearchedKey, ...]:
    """The keys to vary, in order. Raises InputError for ranges that are none, and conditions on keys not before."""
    made: dict[str, SearchedKey] = {}
    for name, given in document.items():
        place = f"keys.{name}"
        settings = {"choices": given} if isinstance(given, list) else given
        if not isinstance(settings, dict):
            raise InputError(f"{place}: give low and high, or a list of choices, not {shortened(given)}")
        check_keys(settings, _KEYS, f"{place}.")
        when = _conditions(settings, place, made)
        made[name] = _choices(name, settings, when) if "choices" in settings else _range(name, settings, when)
    return tuple(made.values())


def suggested(keys: Sequence[SearchedKey], suggest: Callable[[SearchedKey], Any]) -> dict[str, Any]:
    """A value for each key that applies, in order; `suggest` proposes one."""
    values: dict[str, Any] = {}
    for key in keys:
        if key.applies(values):
            values[key.name] = suggest(key)
    return values


def grid_of(keys: Sequence[SearchedKey]) -> list[dict[str, Any]]:
    """All combinations, the last key changing fastest, each once: a key that does not apply is not in it."""
    rows: dict[str, dict[str, Any]] = {}
    for row in itertools.product(*(key.grid for key in keys)):
        given = dict(zip((key.name for key in keys), row, strict=True))
        values = suggested(keys, lambda key, given=given: given[key.name])  # type: ignore[misc]
        rows.setdefault(strict_json(values), values)
    return list(rows.values())


def probes(keys: Sequence[SearchedKey]) -> Iterator[tuple[str, dict[str, Any]]]:
    """For each value at an end of a key, or among its choices: the key's name, and values of all with it."""
    for probed in keys:
        for value in probed.extremes:
            forced = {probed.name: value, **{name: allowed[0] for name, allowed in probed.when.items()}}
            yield (
                probed.name,
                suggested(keys, lambda key, forced=forced: forced.get(key.name, key.extremes[0])),  # type: ignore[misc]
            )


def _conditions(settings: Mapping[str, Any], place: str, made: Mapping[str, SearchedKey]) -> dict[str, tuple[Any, ...]]:
    conditions: dict[str, tuple[Any, ...]] = {}
    for name, value in mapping_at(settings, "when", f"{place}.").items():
        if name not in made:
            raise InputError(f"{place}.when: '{name}' is no key of the search before this one; {nearest(name, made)}")
        allowed = tuple(value) if isinstance(value, list) else (value,)
        known = made[name]
        for one in allowed:
            if known.kind == "categorical" and one not in known.choices:
                said = ", ".join(known.labels)
                raise InputError(f"{place}.when.{name}: {shortened(one)} is none of its choices ({said})")
            if known.kind != "categorical" and not (_is_number(one) and known.low <= one <= known.high):
                raise InputError(
                    f"{place}.when.{name}: {shortened(one)} is not between {known.low:g} and {known.high:g}"
                )
        if not allowed:
            raise InputError(f"{place}.when.{name}: give at least one value")
        conditions[name] = allowed
    return conditions


def _choices(name: str, settings: Mapping[str, Any], when: Mapping[str, tuple[Any, ...]]) -> SearchedKey:
    place, choices = f"keys.{name}", settings["choices"]
    if settings.get("type", "categorical") != "categorical":
        raise InputError(f"{place}.type: with choices it is categorical, not {shortened(settings['type'])}")
    if extra := [key for key in ("low", "high", "step", "log") if key in settings]:
        raise InputError(f"{place}.{extra[0]}: choices have none; leave it out, or leave choices out")
    if not isinstance(choices, list) or not choices:
        raise InputError(f"{place}.choices: give a list of at least one value, not {shortened(choices)}")
    key = SearchedKey(name, "categorical", choices=tuple(choices), when=when)
    if len(set(key.labels)) < len(choices):
        raise InputError(f"{place}.choices: a value is there twice: {', '.join(key.labels)}")
    return key


def _range(name: str, settings: Mapping[str, Any], when: Mapping[str, tuple[Any, ...]]) -> SearchedKey:
    place = f"keys.{name}"
    for bound in ("low", "high"):
        if not _is_number(settings.get(bound)):
            said = shortened(settings[bound]) if bound in settings else "missing"
            raise InputError(f"{place}.{bound}: give a number (or choices in place of low and high); it is {said}")
    low, high, step, log = settings["low"], settings["high"], settings.get("step"), settings.get("log", False)
    kind = settings.get("type") or _kind_of(name, [low, high, *([] if step is None else [step])])
    if kind not in ("float", "int"):
        raise InputError(f"{place}.type: between low and high it is float or int, not {shortened(kind)}")
    if not isinstance(log, bool):
        raise InputError(f"{place}.log: true or false, not {shortened(log)}")
    if low > high:
        raise InputError(f"{place}: low ({low:g}) is above high ({high:g}); swap them")
    if low == high:
        raise InputError(f"{place}: low and high are both {low:g}, so there is nothing to search; put it in the recipe")
    if log and low <= 0:
        raise InputError(f"{place}: a logarithmic scale begins above 0, and low is {low:g}; raise it, or leave log out")
    if log and step is not None:
        raise InputError(f"{place}: log and step do not go together; leave one of them out")
    if step is not None and not (_is_number(step) and 0 < step <= high - low):
        raise InputError(f"{place}.step: give a number above 0 and up to high - low, not {shortened(step)}")
    if kind == "int" and any(value != int(value) for value in (low, high, step or 1)):
        raise InputError(f"{place}: an int has whole numbers as low, high and step")
    return SearchedKey(name, kind, float(low), float(high), None if step is None else float(step), log, when=when)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _kind_of(name: str, numbers: Sequence[float]) -> Kind:
    """Whole numbers are an int, but where the recipe's key takes fractions alone."""
    return "int" if all(isinstance(number, int) for number in numbers) and not _takes_fractions(name) else "float"


def _takes_fractions(name: str) -> bool:
    """Whether the recipe's key is of fractions (`training.learning_rate`), where whole numbers are fractions, too."""
    kind = str(type_of(name))
    return "float" in kind and "int" not in kind
