"""Reading a recipe: YAML as people write it, overrides from the command line, errors as sentences.

Knows nothing of what the keys mean: that is `core_training.recipe.schema`. Imports none of the heavy libraries.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

import core_training.recipe.axolotl as axolotl
import core_training.recipe.llamafactory as llamafactory
from core_training.foundation.bounded_reading import (
    MOST_YAML_BYTES,
    BoundedLoader,
    ForeignTextError,
    bounded,
    parse_yaml,
    read_bounded,
    shortened,
    shortened_text,
)
from core_training.foundation.errors import InputError
from core_training.parts.aggregation_rules import AGGREGATION_RULES
from core_training.parts.codecs import CODECS
from core_training.parts.data_kinds import DATA_KINDS
from core_training.parts.mixing_rules import MIXING_RULES
from core_training.parts.outer_steps import OUTER_STEPS
from core_training.parts.section import Section
from core_training.parts.stages import STAGES
from core_training.parts.tuning_modes import TUNING_MODES
from core_training.recipe.home import STANDARD_INPUT, expand_home
from core_training.recipe.key_types import without_wrapping
from core_training.recipe.schema import Recipe


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides; `~` in its paths is the home folder.

    Raises InputError, naming the key (or the YAML line) and what would be right.
    """
    is_stream = Path(path) == STANDARD_INPUT
    source = "standard input" if is_stream else str(path)
    text = read_text(path, "recipe")
    if is_stream and not text.strip():
        raise InputError("standard input: there is no recipe on it; pipe one in, or name its file")
    return parse_recipe(text, source, overrides, at_home=True)


def read_text(path: str | Path, what: str) -> str:
    """The text of a file that a person wrote; `what` says in errors what it was to be. Raises InputError."""
    source = "standard input" if Path(path) == STANDARD_INPUT else str(path)
    try:
        return _content(Path(path)).decode("utf-8")
    except FileNotFoundError:
        raise InputError(f"{source}: no such {what} file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source}: cannot be read as UTF-8 text: {shortened_text(error, 200)}") from None
    except ForeignTextError as error:
        raise InputError(f"{source}: not a {what}: {error}") from None


def _content(path: Path) -> bytes:
    """A recipe's bytes. A shell's stream (`-`, `/dev/stdin`, `<(…)`) is one that somebody writes to: it is read on."""
    if path == STANDARD_INPUT:
        return bounded(sys.stdin.buffer, MOST_YAML_BYTES)
    if not str(path).startswith(_STREAMS):
        return read_bounded(path, MOST_YAML_BYTES)
    with path.open("rb") as stream:
        return bounded(stream, MOST_YAML_BYTES)


def parse_recipe(
    text: str, source: str = "recipe", overrides: list[str] | None = None, *, at_home: bool = False
) -> Recipe:
    """Read a recipe from YAML text; `source` names it in errors, which are those of `load_recipe`.

    `at_home` says that its paths are of whoever runs this, so that `~` is the home folder. One from outside could have
    the folder's name told in an error.
    """
    for parts in (DATA_KINDS, STAGES, TUNING_MODES, CODECS, AGGREGATION_RULES, MIXING_RULES, OUTER_STEPS):
        parts.check()
    if both := AGGREGATION_RULES.keys() & MIXING_RULES.keys():
        raise InputError(f"an aggregation rule and a mixing rule are both called '{min(both)}'; rename one")
    document = parse_document(text, source)
    if not isinstance(document, dict):
        raise InputError(f"{source}: a recipe is a mapping of sections (model, stage, tuning, data, …)")
    if llamafactory.is_flat_yaml(document):
        document = llamafactory.to_recipe(document, source)
    elif axolotl.is_axolotl(document):
        document = axolotl.to_recipe(document, source)
    for override in overrides or []:
        _apply_override(document, override)
    if at_home:
        expand_home(document)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        by_key: dict[str, list[Any]] = {}
        for item in error.errors():
            by_key.setdefault(_key_of(item["loc"]), []).append(item)
        # Where a key may have several types, an error further inside says more than that it is not of the other type.
        outer = {key[:place] for key in by_key for place, sign in enumerate(key) if sign == "."}
        telling = [key for key in by_key if key not in outer]
        raise InputError(f"{source}: " + "; ".join(_explain(key, by_key[key]) for key in telling[:3])) from None


class _Loader(BoundedLoader):
    """YAML as people write it: `1e-3` is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                problem = f"key '{shortened_text(key, 60)}' is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(key if isinstance(key, str) else repr(key))
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [entry for entry in entries if entry[0] != "tag:yaml.org,2002:float"]
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def parse_document(text: str, source: str) -> Any:
    """The value of a YAML text as recipes are written; `source` names it in errors. Raises InputError."""
    try:
        return parse_yaml(text, _Loader)
    except ForeignTextError as error:
        line = "" if error.line is None else f", line {error.line}"
        raise InputError(f"{source}{line}: {error}") from None


def _apply_override(document: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        said = shortened_text(override, 100)
        raise InputError(f"'{said}': an override is KEY=VALUE, such as training.learning_rate=1e-4")
    *parents, last = key.split(".")
    target = document
    for parent in parents:
        inner = target.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise InputError(f"{key}: '{parent}' is a value, not a section")
        target = inner
    target[last] = parse_document(value, key)


_LONGEST_KEY = 60
_STREAMS = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")
_TYPE_ENDINGS = re.compile(r"^(literal\[|list\[|dict\[|function-|constrained-)|^(str|int|float|bool|none)$")
"""The end that pydantic puts to an error's place for each type that a key may have."""


def _key_of(location: Sequence[str | int]) -> str:
    parts = [shortened_text(part, _LONGEST_KEY) for part in location]
    while len(parts) > 1 and _TYPE_ENDINGS.search(parts[-1]):
        parts.pop()
    # Where a key may be a section or something else, pydantic names the section's class, too.
    classes = {section.__name__ for section in Section.__subclasses__()}
    inner = [part for part in parts[:-1] if part not in classes]
    return ".".join(part for part in [*inner, *parts[-1:]] if not part.startswith(("literal[", "list[", "dict[")))


def _explain(key: str, errors: list[Any]) -> str:
    """Pydantic's error on one key as a sentence: the key, what is wrong, what would be right.

    A key that may have several types has an error for each of them.
    """
    error = errors[0]
    *section, name = [shortened_text(part, _LONGEST_KEY) for part in error["loc"]] or [""]
    if error["type"] == "extra_forbidden":
        known = _keys_of(section)
        close = difflib.get_close_matches(name[:_LONGEST_KEY], known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{key}: this key is required"
    if error["type"] == "model_type":
        examples = ", ".join(_keys_of([*section, name])[:3])
        return f"{key}: this is a section with keys of its own ({examples}, …), not {shortened(error['input'])}"
    if error["type"] == "value_error":
        said = shortened_text(str(error["msg"]).removeprefix("Value error, "))
        return ".".join([*key.split("."), said]).lstrip(".")
    messages = list(dict.fromkeys(str(one["msg"])[0].lower() + str(one["msg"])[1:] for one in errors))
    wanted = " or ".join([messages[0], *(message.removeprefix("input should be ") for message in messages[1:])])
    return f"{key}: {wanted}, not {shortened(error['input'])}"


def _keys_of(location: list[str]) -> list[str]:
    section: Any = Recipe
    for part in location:
        if part in section.model_fields:
            section = without_wrapping(section.model_fields[part].annotation)
    return list(section.model_fields)
