"""Digests of what a step reads: files by their content, run folders by the state that came out, other folders whole.

A file is read once as long as its size and its time of change stay as they were, also from one command to the next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from core_training.data.records import content_digest, data_files
from core_training.foundation.bounded_reading import ForeignTextError, open_regular, read_json
from core_training.foundation.durable import commit_file
from core_training.foundation.errors import InputError
from core_training.foundation.hub_models import find_model
from core_training.foundation.places import is_folder
from core_training.recipe.home import PATHS
from core_training.recipe.llamafactory_data import names_data_set
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder

_CHANGING = {".lock", ".html"}
"""Endings of files in a folder that say nothing of what is in it."""


class Digester:
    """SHA-256 digests (hex), with those of files remembered in the file `memory`."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        try:
            known = read_json(memory)
        except (OSError, ForeignTextError):
            known = {}
        self._known: dict[str, Any] = known if isinstance(known, dict) else {}

    def keep(self) -> None:
        """Write down the digests of files. Raises RunError when the disk refuses."""
        commit_file(self._memory, json.dumps(self._known).encode())

    def of_place(self, place: Path) -> str:
        """The digest of a file, of a finished run's state, or of all files of another folder."""
        if not is_folder(place):
            return self._of_file(place)
        if (place / "recipe.yaml").is_file() and (summary := RunFolder(place).summary()) is not None:
            state = [summary.get("initial_digest"), summary.get("state_digest")]
            if state[1] is not None:
                return digest_of(state)
        files = (path for path in sorted(place.rglob("*")) if path.is_file() and _counts(path, place))
        return digest_of([[str(path.relative_to(place)), self._of_file(path)] for path in files])

    def of_recipe(self, recipe: Recipe) -> str:
        """The digest of a recipe's values, but for where it writes to, and of all that it names on this machine."""
        document = recipe.model_dump(mode="json", exclude={"output": True})
        return digest_of([document, [[name, self.of_place(path)] for name, path in self._places(document)]])

    def _places(self, document: dict[str, Any]) -> Iterator[tuple[str, Path]]:
        """What a recipe's values name on this machine: the key, and the file or folder."""
        for section, keys in PATHS.items():
            for key in keys:
                for text in _texts((document.get(section) or {}).get(key)):
                    yield from ((f"{section}.{key}", path) for path in _named(section, key, text))

    def _of_file(self, path: Path) -> str:
        if names_data_set(path):
            return content_digest(path).hex()
        try:
            status = path.stat()
            key, changed = str(path.resolve()), [status.st_size, status.st_mtime_ns]
            if (known := self._known.get(key)) is not None and known[:2] == changed:
                return str(known[2])
            with open_regular(path) as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
        self._known[key] = [*changed, digest]
        return digest


def digest_of(document: Any) -> str:
    """SHA-256 (hex) of a value as JSON."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def named_here(name: str) -> list[Path]:
    """What a step's name stands for on this machine, if anything: a file, a folder, a function's file (`FILE:NAME`), a
    judge's model (`KIND:MODEL`), or a model of the hub's cache.
    """
    for text in (name, name.rpartition(":")[0], name.partition(":")[2]):
        if text and Path(text).exists():
            return [Path(text)]
    found = find_model(name.partition(":")[2] or name)
    return [] if found is None else [found]


def _counts(path: Path, place: Path) -> bool:
    parts = path.relative_to(place).parts
    return path.suffix not in _CHANGING and not any(part.startswith(".") for part in parts)


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):  # functions' weights have the paths as keys, sites' files as values
        return [text for pair in value.items() for text in pair if isinstance(text, str)]
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def _named(section: str, key: str, text: str) -> list[Path]:
    """The files and folders that a text of a recipe stands for; none for a name that is not on this machine."""
    if section == "data" and key in ("train", "eval") and not is_folder(text):
        return _data(text)
    if (section, key) == ("simulation", "sites"):
        return _data(text, must_be_there=False)
    if (section, key) == ("data", "cache"):
        return []
    if (section, key) == ("model", "name_or_path"):
        folder = find_model(text)
        return [] if folder is None else [folder]
    for name in (text, text.rpartition(":")[0]):  # a function is FILE:NAME
        if name and Path(name).exists():
            return [Path(name)]
    return []


def _data(text: str, *, must_be_there: bool = True) -> list[Path]:
    try:
        files = data_files(text)
    except InputError:  # a site's name, where sites are named; a data set's, where it is none of a file
        if must_be_there:
            raise
        return []
    return files
