"""The YAML files of this room: read as recipes are, with errors that name the key and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from core_training.foundation.bounded_reading import shortened, shortened_text
from core_training.foundation.errors import InputError
from core_training.foundation.strict_json import strict_json
from core_training.recipe.reading import parse_document, parse_recipe, read_text
from core_training.recipe.schema import Recipe


def load_mapping(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file; `what` is what it is to be. Raises InputError, naming the line."""
    document = parse_document(read_text(path, what), str(path))
    if not isinstance(document, dict):
        raise InputError(f"{path}: a {what} is a mapping of keys, not {shortened(document)}")
    return document


def check_keys(document: Mapping[str, Any], known: Iterable[str], place: str) -> None:
    """Raise InputError for a key that is not one of `known`, with the one that it is like."""
    for key in document:
        if key not in known:
            raise InputError(f"{place}{shortened_text(key, 60)}: unknown key; {nearest(key, known)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint for a name that is none of these."""
    known = list(known)
    close = difflib.get_close_matches(name[:60], known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known) or 'none'}"


def mapping_at(document: Mapping[str, Any], key: str, place: str) -> dict[str, Any]:
    """The mapping under a key; empty where it is not given. Raises InputError for another value."""
    value = document.get(key) or {}
    if not isinstance(value, dict):
        raise InputError(f"{place}{key}: this is a mapping of keys to values, not {shortened(value)}")
    return value


def whole_at(document: Mapping[str, Any], key: str, default: int, place: str, least: int = 1) -> int:
    """The whole number under a key. Raises InputError for another value, or for less than `least`."""
    value = document.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{place}{key}: give a whole number from {least} up, not {shortened(value)}")
    return value


def choice_at(document: Mapping[str, Any], key: str, default: str, known: Iterable[str], place: str) -> str:
    """The name under a key. Raises InputError for one that is not one of `known`."""
    value = document.get(key, default)
    if value not in known:
        raise InputError(f"{place}{key}: {shortened(value)} is not known; {nearest(str(value), known)}")
    return str(value)


def recipe_of(given: object, values: Mapping[str, Any], home: Path, place: str, output: Path) -> Recipe:
    """A recipe that a file names, beside the folder `home`, or holds; with these values under dotted keys.

    A recipe file that `home` lacks is looked for in the folder that the command runs in. The run goes into `output`.
    Raises InputError as `load_recipe`.
    """
    overrides = [
        *(f"{key}={strict_json(value)}" for key, value in values.items()),
        f"output={strict_json(str(output))}",
    ]
    if isinstance(given, dict):
        return parse_recipe(yaml.safe_dump(given), place.rstrip(". "), overrides, at_home=True)
    if not isinstance(given, str):
        raise InputError(f"{place}recipe: name a recipe file, or write a recipe, not {shortened(given)}")
    path = beside(given, home)
    return parse_recipe(read_text(path, "recipe"), str(path), overrides, at_home=True)


def beside(name: str, home: Path) -> Path:
    """The file of this name in the folder `home` or, where that has none, in the one that the command runs in."""
    own = home / Path(name).expanduser()
    return own if own.exists() else Path(name).expanduser()


def each_text(value: Any, change: Callable[[str], str]) -> Any:
    """A value with every text in it, keys too, changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [each_text(one, change) for one in value]
    if isinstance(value, dict):
        return {each_text(key, change): each_text(inner, change) for key, inner in value.items()}
    return value
