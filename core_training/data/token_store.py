"""Tokenised examples on disk: written once, then read from memory maps, so that they need not fit in memory.

A store is a folder named after the digest of all that decides its content. It holds plain arrays and an index with
their sizes: nothing in it is code. It is as private as the records it comes from (folders 0700, files 0600).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import numpy.typing as npt

from core_training.data.examples import Example, Tokens
from core_training.foundation.durable import commit_folder
from core_training.foundation.errors import RunError

_INDEX = "index.json"
_INPUT_IDS, _LABELS = "input_ids.int32", "labels.int32"
_SEQUENCES, _EXAMPLES = "sequences.int64", "examples.int64"
"""The ends of each sequence's tokens, and of each example's sequences; both start with a 0."""
_PARTS = "parts.int32"
_COLUMNS, _COLUMN_ENDS = "columns.bytes", "columns.int64"
"""The examples' further columns one after another, and where each one's end."""
_NUMBERS = "number-"


class TokenWriter:
    """A writer that appends examples to a store's files, one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._tokens = self._sequences = self._examples = 0
        for name in (_INPUT_IDS, _LABELS, _SEQUENCES, _EXAMPLES, _PARTS):
            self._open(name)
        self._put(_SEQUENCES, np.int64(0))
        self._put(_EXAMPLES, np.int64(0))

    def append(self, example: Example, part: int) -> None:
        """Add an example; `part` is the number of the part of the data to which it belongs."""
        for tokens in example.sequences:
            self._put(_INPUT_IDS, tokens.input_ids.astype(np.int32))
            self._put(_LABELS, tokens.labels.astype(np.int32))
            self._tokens += len(tokens)
            self._sequences += 1
            self._put(_SEQUENCES, np.int64(self._tokens))
        for name, number in example.numbers.items():
            self._fill(_NUMBERS + name)
            self._put(_NUMBERS + name, np.float64(number))
        if example.columns and _COLUMNS not in self._files:
            self._open(_COLUMNS)
            self._open(_COLUMN_ENDS)
            self._put(_COLUMN_ENDS, np.zeros(self._examples + 1, dtype=np.int64))
        if _COLUMNS in self._files:
            self._files[_COLUMNS].write(example.columns)
            self._put(_COLUMN_ENDS, np.int64(self._files[_COLUMNS].tell()))
        self._put(_PARTS, np.int32(part))
        self._examples += 1
        self._put(_EXAMPLES, np.int64(self._sequences))

    def close(self, notes: Mapping[str, Any]) -> None:
        """Write the index; `notes` come back from the store as they are."""
        for name in self._files:
            if name.startswith(_NUMBERS):
                self._fill(name)
        self.abandon()
        sizes = {name: (self._folder / name).stat().st_size for name in self._files}
        body = json.dumps({"sizes": sizes, "notes": notes}, sort_keys=True)
        index = json.dumps({"body": body, "sha256": hashlib.sha256(body.encode()).hexdigest()})
        self._open(_INDEX).write(index.encode())
        self._files[_INDEX].close()

    def abandon(self) -> None:
        """Let go of the files, finished or not."""
        for stream in self._files.values():
            stream.close()

    def _open(self, name: str) -> BinaryIO:
        descriptor = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._files[name] = os.fdopen(descriptor, "wb")
        return self._files[name]

    def _put(self, name: str, values: Any) -> None:
        self._files[name].write(values.tobytes())

    def _fill(self, name: str) -> None:
        """Bring a file of numbers up to the present example: not a number stands for none."""
        stream = self._files.get(name) or self._open(name)
        stream.write(np.full(self._examples - stream.tell() // 8, math.nan).tobytes())


class TokenStore(Sequence[Example]):
    """The examples of a store, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Open it. Raises ValueError when it is damaged, FileNotFoundError when it is not there."""
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        body = index["body"]
        if hashlib.sha256(body.encode()).hexdigest() != index["sha256"]:
            raise ValueError("the index is not what was written")
        content = json.loads(body)
        for name, size in content["sizes"].items():
            if (folder / name).stat().st_size != size:
                raise ValueError(f"{name} has not the size it was written with")
        self.notes: dict[str, Any] = content["notes"]
        self._input_ids, self._labels = (_mapped(folder / name, np.int32) for name in (_INPUT_IDS, _LABELS))
        self._sequences, self._examples = (_mapped(folder / name, np.int64) for name in (_SEQUENCES, _EXAMPLES))
        self.parts = _mapped(folder / _PARTS, np.int32)
        """The number of each example's part."""
        self._columns = self._column_ends = None
        if _COLUMNS in content["sizes"]:
            self._columns = _mapped(folder / _COLUMNS, np.uint8)
            self._column_ends = _mapped(folder / _COLUMN_ENDS, np.int64)
        self._numbers = {
            name.removeprefix(_NUMBERS): _mapped(folder / name, np.float64)
            for name in sorted(content["sizes"])
            if name.startswith(_NUMBERS)
        }

    def __len__(self) -> int:
        return len(self._examples) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        first, last = self._examples[index], self._examples[index + 1]
        ends = self._sequences[first : last + 1]
        sequences = tuple(
            Tokens(self._input_ids[start:end].astype(np.int64), self._labels[start:end].astype(np.int64))
            for start, end in pairwise(ends)
        )
        numbers = {name: float(values[index]) for name, values in self._numbers.items()}
        known = {name: number for name, number in numbers.items() if not math.isnan(number)}
        return Example(sequences, known, self._columns_of(index))

    def _columns_of(self, index: int) -> bytes:
        if self._columns is None or self._column_ends is None:
            return b""
        columns: bytes = self._columns[self._column_ends[index] : self._column_ends[index + 1]].tobytes()
        return columns

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example, all its sequences together."""
        lengths: npt.NDArray[np.int64] = np.diff(self._sequences[self._examples])
        return lengths


def open_store(folder: Path, write: Callable[[TokenWriter], Mapping[str, Any]]) -> TokenStore:
    """The store in `folder`; where there is none, or a damaged one, `write` fills it and returns its notes.

    Of several processes that ask for one store, one writes it and the others wait. Raises RunError when the disk
    refuses.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise RunError(f"{folder.parent} could not be made ({error})") from error
    if (store := _opened(folder)) is not None:
        return store
    with _locked(folder):
        if (store := _opened(folder)) is None:
            with commit_folder(folder) as scratch:
                scratch.chmod(0o700)
                writer = TokenWriter(scratch)
                try:
                    writer.close(write(writer))
                finally:
                    writer.abandon()
            store = TokenStore(folder)
    return store


def _opened(folder: Path) -> TokenStore | None:
    try:
        return TokenStore(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, cut short, or not what was written
        return None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the system lets go of a killed one's lock."""
    descriptor = os.open(folder.with_name(f".{folder.name}.lock"), os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _mapped(path: Path, dtype: Any) -> npt.NDArray[Any]:
    """A read-only memory map; an empty file cannot be mapped."""
    return np.asarray(np.memmap(path, dtype=dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype)
