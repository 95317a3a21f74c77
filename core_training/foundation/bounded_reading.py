"""Text from outside, bounded before anything looks at it: its size, depth, aliases and digits.

A few hundred bytes can stand for more than a machine holds: YAML's aliases multiply what they stand for, and a number
of a million digits takes longer to write out than to send. So every document of somebody else's is read here, and
whatever an error says of a value goes through `shortened`. Knows nothing of what documents mean.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from collections import Counter
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import yaml
from pydantic import ValidationError

from core_training.foundation.foreign_text import printable

MOST_YAML_BYTES = 2**20
"""Bytes of a document that people write. Longer ones would take the parser, which is Python, many seconds."""
MOST_JSON_BYTES = 64 * 2**20
_DEEPEST = 64
_TOO_DEEP = "it is nested too deeply"
_MOST_VALUES = 50_000
"""Values of a YAML document with every alias written out."""
_MOST_DIGITS = 40
"""Digits of a whole number: those of 128 bits. No field anywhere takes more."""
_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
_SHOWN = 60
_LONGEST_LINE = 500
_LONGEST_PLACE = 8


class ForeignTextError(ValueError):
    """What is wrong with a document, in a few words; `line` says where, if that is known (from 1)."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


class _Shortener(reprlib.Repr):
    """Python's shortener, which would write out a whole number before it cuts it."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 3
        self.maxstring = self.maxlong = self.maxother = _SHOWN

    def repr_int(self, value: int, level: int) -> str:
        bits = value.bit_length()
        return super().repr_int(value, level) if bits < 256 else f"a number of about {bits * 3 // 10} digits"


_shortener = _Shortener()


def shortened(value: Any) -> str:
    """A value as an error may show it: as `repr` does, and of what is long or nested only the beginning and the end."""
    return _shortener.repr(value)


def shortened_text(text: object, most: int = _LONGEST_LINE) -> str:
    """Words of somebody else's in an error: one line of printable letters, and no longer than `most`."""
    line = printable(str(text)[: 2 * most]).strip()
    return line if len(line) <= most else line[: most - 1] + "…"


def first_error(error: ValidationError) -> str:
    """What pydantic says first of somebody else's document: the place, whose names are theirs, and what is wrong."""
    place, said = place_and_words(error)
    return f"{place}: {said}" if place else said


def place_and_words(error: ValidationError) -> tuple[str, str]:
    """The two halves of `first_error`; the place is empty where the document as a whole is wrong."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(shortened_text(part, _SHOWN) for part in first["loc"][:_LONGEST_PLACE])
    return place, shortened_text(str(first["msg"]).removeprefix("Value error, "))


def reason_of(error: OSError | ForeignTextError) -> str:
    """Why a file cannot be read, in a few words."""
    return getattr(error, "strerror", None) or str(error)


def open_regular(path: Path) -> BufferedReader:
    """Open a file to read, unless it is a pipe, a device or a folder. Raises OSError.

    Opening a named pipe waits for somebody to write to it, and a device may never end.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # half of a pair in its name, or an end of a text
        raise OSError(f"no disk has a file of that name: {error}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is no regular file, but a pipe, a device or a folder")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bounded(path: Path, most: int) -> bytes:
    """The content of a regular file of at most so many bytes. Raises OSError, and ForeignTextError for a larger one."""
    with open_regular(path) as file:
        return bounded(file, most)


def read_lines(path: Path, start: int = 0) -> Iterator[bytes]:
    """The lines of a regular file from byte `start` on; one that is longer than any comes in pieces. Raises OSError."""
    with open_regular(path) as file:
        file.seek(start)
        yield from iter(lambda: file.readline(MOST_JSON_BYTES), b"")


def bounded(stream: BinaryIO, most: int) -> bytes:
    """What is left of a stream, of at most so many bytes. Raises ForeignTextError for more."""
    content = stream.read(most + 1)
    if len(content) > most:
        raise ForeignTextError(f"it is larger than {_size(most)}")
    return content


def parse_json(text: str | bytes, most: int = MOST_JSON_BYTES, *, keys_once: bool = False) -> Any:
    """The value of a JSON text. Raises ForeignTextError for any other text, and for what is out of all proportion.

    NaN and Infinity, which are no JSON, are refused; with `keys_once` so is an object with one key twice, of whose
    values all but the last would vanish.
    """
    hook = _object_of_keys_once if keys_once else None
    if len(text) > most:
        raise ForeignTextError(f"it is larger than {_size(most)}")
    try:
        value = json.loads(text, parse_int=_whole_number, parse_constant=_no_constant, object_pairs_hook=hook)
    except json.JSONDecodeError as error:
        raise ForeignTextError(f"not valid JSON: {error.msg}", error.lineno) from None
    except UnicodeDecodeError:
        raise ForeignTextError("not valid JSON: it is not UTF-8") from None
    except RecursionError:
        raise ForeignTextError(_TOO_DEEP) from None
    check_depth(value)
    return value


def parse_value(text: str | bytes) -> Any:
    """The value of a JSON text that stands in a record, whose size is bounded there, with any number and NaN.

    Raises ForeignTextError for what is nested too deeply, and what `json.loads` raises.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ForeignTextError(_TOO_DEEP) from None
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raise ForeignTextError for lists and mappings nested deeper than anything that goes through them bears."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for one in level if isinstance(one, dict | list) for inner in _inside(one)]
        if not level:
            return
    raise ForeignTextError(_TOO_DEEP)


def read_json(path: Path, most: int = MOST_JSON_BYTES, *, keys_once: bool = False) -> Any:
    """The value in a JSON file. Raises OSError, and ForeignTextError as `parse_json`."""
    return parse_json(read_bounded(path, most), most, keys_once=keys_once)


class BoundedLoader(yaml.SafeLoader):
    """YAML without what makes much out of little. Errors are YAML's, with their line."""

    _depth = 0
    _values = 0

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        _check_expanded(node)
        return self.construct_document(node)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        self._values += 1
        if self._depth > _DEEPEST:
            raise yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=self.get_mark())
        if self._values > _MOST_VALUES:
            raise yaml.MarkedYAMLError(problem="it has too many values", problem_mark=self.get_mark())
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:bool":  # `on: FILE` is a key, whatever YAML 1.1 says
                key.tag = "tag:yaml.org,2002:str"
            # Only texts are hashed with a secret of the process: numbers can be chosen so that all collide.
            if key.tag not in _KEY_TAGS:
                problem = "a key that is no text; put it in quotes"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return node

    def compose_scalar_node(self, anchor: dict[Any, yaml.Node]) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > _MOST_DIGITS:
            problem = f"a number of {len(node.value)} digits is too large"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return node


def parse_yaml(text: str, loader: type[BoundedLoader] = BoundedLoader) -> Any:
    """The value of a YAML text. Raises ForeignTextError for any other text, and for what is out of all proportion."""
    if len(text) > MOST_YAML_BYTES or len(text.encode(errors="replace")) > MOST_YAML_BYTES:
        raise ForeignTextError(f"it is larger than {_size(MOST_YAML_BYTES)}")
    try:
        return yaml.load(text, loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise ForeignTextError(f"not valid YAML: {shortened_text(error.problem, 200)}", line) from None
    except RecursionError:
        raise ForeignTextError(_TOO_DEEP) from None
    except Exception as error:  # what a text is no value of (`!!bool maybe`, a 30th of February) raises this and that
        raise ForeignTextError(f"not valid YAML: {shortened_text(error, 200)}") from None


def read_yaml(path: Path, loader: type[BoundedLoader] = BoundedLoader) -> Any:
    """The value in a YAML file. Raises OSError, and ForeignTextError as `parse_yaml`."""
    try:
        return parse_yaml(read_bounded(path, MOST_YAML_BYTES).decode("utf-8"), loader)
    except UnicodeDecodeError as error:
        raise ForeignTextError(f"not UTF-8 text (byte {error.start + 1})") from None


def _check_expanded(root: yaml.Node) -> None:
    """Raise MarkedYAMLError for a document that is too much once its aliases are written out, or endless."""
    known: dict[int, tuple[int, int]] = {}
    inside: set[int] = set()

    def measured(node: yaml.Node) -> tuple[int, int]:
        """The values in a node, and how deep they are nested. Anchors come before their aliases, so few are new."""
        if isinstance(node, yaml.ScalarNode):
            return 1, 1
        if id(node) in inside:
            raise yaml.MarkedYAMLError(problem="an alias stands for what it is in", problem_mark=node.start_mark)
        if id(node) not in known:
            inside.add(id(node))
            is_mapping = isinstance(node, yaml.MappingNode)
            children = [child for pair in node.value for child in pair] if is_mapping else node.value
            sizes, depths = zip(*map(measured, children), strict=True) if children else ((), ())
            known[id(node)] = 1 + sum(sizes), 1 + max(depths, default=0)
            inside.remove(id(node))
        size, depth = known[id(node)]
        if size > _MOST_VALUES or depth > _DEEPEST:
            raise yaml.MarkedYAMLError(problem="its aliases stand for too much", problem_mark=node.start_mark)
        return size, depth

    measured(root)


def _inside(value: dict[str, Any] | list[Any]) -> list[Any]:
    children = value.values() if isinstance(value, dict) else value
    return [child for child in children if isinstance(child, dict | list)]


def _whole_number(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ForeignTextError(f"a number of {len(digits)} digits is too large")
    return int(digits)


def _object_of_keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = [key for key, count in counts.items() if count > 1]
        others = f" (and {len(twice) - 1} more keys)" if len(twice) > 1 else ""
        raise ForeignTextError(f"an object has the key {shortened(twice[0])} {counts[twice[0]]} times{others}")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ForeignTextError(f"not valid JSON: {name} is no number there")


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 2**20 else f"{count >> 10} KiB"
