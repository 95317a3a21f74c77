"""Reading records from the files people have, one at a time, and naming file and line where one is wrong.

Knows nothing of stages or tokens: a record is a mapping of column names to values.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from core_training.data.hub_cache import SHARD, cached_files
from core_training.data.sizes import LONGEST_RECORD, UNFOLDS, most_unfolded
from core_training.data.tables import arrow_rows, csv_rows, excel_rows, parquet_rows
from core_training.foundation.bounded_reading import ForeignTextError, check_depth, open_regular, shortened_text
from core_training.foundation.errors import InputError
from core_training.foundation.places import is_folder, is_there
from core_training.recipe.llamafactory_data import names_data_set, read_entry

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".xlsx", ".parquet", ".arrow")
_STARS = re.compile(r"(\*\*/)+")
_BINARY = (".xlsx", ".parquet", ".arrow")
_LARGEST_WHOLE = 512 * 2**20
"""Bytes of a .json file, of which the machine needs several times as much."""


OnError = Callable[[InputError], None]


@dataclass(frozen=True)
class Record:
    """One record, where it stood, and the name of its source (the file's name without suffixes)."""

    fields: dict[str, Any]
    path: Path
    line: int

    @property
    def place(self) -> str:
        unit = "record" if _kind(self.path) in (".json", ".parquet", ".arrow") else "line"
        return f"{self.path}, {unit} {self.line}"

    @property
    def source(self) -> str:
        return source_name(self.path)


def source_name(path: Path) -> str:
    """`niddk` for `…/niddk.jsonl.gz`; the data set's name for one of its numbered files, or of the hub's cache."""
    if on_hub := next((part for part in path.parts if part.startswith("datasets--")), None):
        return on_hub.rpartition("--")[2]
    name, numbered = SHARD.subn("", path.name.removesuffix(".gz"))
    if numbered and name == "data.arrow":  # in a folder that `datasets` saved, or in one for each of its parts
        folder = path.parent
        return (folder.parent if (folder.parent / "dataset_dict.json").is_file() else folder).name or name
    return (name.removesuffix(Path(name).suffix) if _kind(Path(name)) else name.split(".")[0]) or path.name


def data_files(patterns: str | list[str]) -> list[Path]:
    """The files that a file, glob, folder, or list of them stands for, sorted, each once.

    `FOLDER/dataset_info.json:NAME`, a data set of LLaMA-Factory's, stays what it is.
    Raises InputError for a pattern that matches nothing or a file of unknown kind.
    """
    found: dict[Path, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        path = Path(pattern)
        if names_data_set(path):
            data_files(str(read_entry(path).path))
            found[path] = None
            continue
        if not (matches := _matching(pattern) or ([] if _kind(path) else cached_files(pattern))):
            raise InputError(f"data: '{pattern}' matches no file (paths are relative to {Path.cwd()})")
        for match in matches:
            if _kind(match) is None:
                raise InputError(f"data: {match}: unknown kind of file; it can be {' '.join(SUFFIXES)} (text also .gz)")
            found[match] = None
    return list(found)


def _matching(pattern: str) -> list[Path]:
    """The files that a folder, a file or a glob stands for. Several `**` in a row are as one."""
    path = Path(pattern)
    if is_folder(path):
        return _in_folder(path)
    if is_there(path):
        return [path]
    return sorted(Path(match) for match in glob.glob(_STARS.sub("**/", pattern), recursive=True))


def _in_folder(folder: Path) -> list[Path]:
    """The files of a folder; of one in which `datasets` saved several parts, those of the part `train`."""
    saved = (folder / "dataset_dict.json").is_file()
    own = folder / "train" if saved else folder
    if saved and not own.is_dir():
        parts = ", ".join(sorted(part.name for part in folder.iterdir() if part.is_dir()))
        raise InputError(f"data: '{folder}' has no part 'train'; name one of its folders: {parts}")
    described = ("dataset_info.json", "state.json") if any(own.glob("*.arrow")) else ()
    return sorted(path for path in own.iterdir() if _kind(path) is not None and path.name not in described)


def records_in(patterns: str | list[str], most: int | None = None, on_error: OnError | None = None) -> Iterator[Record]:
    """The records of all files that these patterns stand for, of each data set at most so many, from the first."""
    read: Counter[Path] = Counter()
    for path in data_files(patterns):
        data_set = path.with_name(SHARD.sub("", path.name))
        left = None if most is None else most - read[data_set]
        for record in islice(read_records(path, on_error), left):
            read[data_set] += 1
            yield record


def read_records(path: Path, on_error: OnError | None = None) -> Iterator[Record]:
    """The records of one file (or of what else `data_files` gives), in order. All but .json is read piece by piece.

    Raises InputError, naming file and line, for what is not UTF-8, not JSON, not an object, or cut short. A line that
    is no record goes to `on_error` where that is given, and is left out.
    """
    if names_data_set(path):
        data_set = read_entry(path)
        records = (record for file in data_files(str(data_set.path)) for record in read_records(file, on_error))
        yield from (replace(record, fields=data_set.fields(record.fields)) for record in islice(records, data_set.most))
        return
    try:
        for one in _records_or_errors(path):
            if isinstance(one, Record):
                yield one
            elif on_error is None:
                raise one
            else:
                on_error(one)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: the gzip file is damaged or cut short: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _records_or_errors(path: Path) -> Iterator[Record | InputError]:
    """The records of a file; for a line that is none, and does not keep the others from being read, an error."""
    kind = _kind(path)
    if kind in _BINARY:
        rows = {".xlsx": excel_rows, ".parquet": parquet_rows, ".arrow": arrow_rows}[kind](path)
        for row in rows:
            yield row if isinstance(row, InputError) else Record(row[1], path, row[0])
        return
    with _open(path) as stream:
        if kind == ".jsonl":
            yield from _read_jsonl(path, stream)
        elif kind == ".json":
            yield from _read_json(path, stream)
        elif kind in (".csv", ".tsv"):
            for row in csv_rows(path, _text_lines(path, stream)):
                yield row if isinstance(row, InputError) else Record(row[1], path, row[0])
        else:
            yield from _read_text(path, stream)


def content_digest(path: Path) -> bytes:
    """SHA-256 over all that decides the records of a file (or of what else `data_files` gives)."""
    if names_data_set(path):
        data_set = read_entry(path)
        files = data_files(str(data_set.path))
        described = repr((data_set.most, sorted(data_set.columns.items()), sorted((data_set.tags or {}).items())))
        content = b"".join(content_digest(file) for file in files)
        return hashlib.sha256(described.encode() + content).digest()
    try:
        with open_regular(path) as stream:
            return hashlib.sha256(path.name.encode() + hashlib.file_digest(stream, "sha256").digest()).digest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


@lru_cache(maxsize=1024)
def _kind(path: Path) -> str | None:
    name = path.name.removesuffix(".gz")
    suffix = Path(name).suffix
    return suffix if suffix in SUFFIXES and not (suffix in _BINARY and path.suffix == ".gz") else None


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a regular file, unpacked where it is packed."""
    with open_regular(path) as file:
        if path.suffix != ".gz":
            yield file
            return
        with gzip.open(file) as unpacked:
            yield unpacked  # type: ignore[misc]


def _pieces(path: Path, stream: BinaryIO, longest: int) -> Iterator[bytes]:
    """The lines as they are. Raises InputError for an endless one, and for a file that unfolds to far too much."""
    most = most_unfolded(path) if path.suffix == ".gz" else None
    longest = longest if most is None else min(longest, most)
    read = number = 0
    while line := stream.readline(longest + 1):
        number += 1
        read += len(line)
        if len(line) > longest:
            raise InputError(
                f"{path}, line {number}: longer than {longest >> 20} MiB; a record is shorter: part it into several"
            )
        if most is not None and read > most:
            raise InputError(f"{path}, line {number}: {UNFOLDS}")
        yield line


def _lines(path: Path, stream: BinaryIO, longest: int = LONGEST_RECORD) -> Iterator[tuple[int, str | InputError]]:
    """The lines with their numbers; for one that is no UTF-8 an error."""
    number = 0
    try:
        for number, line in enumerate(_pieces(path, stream, longest), start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield (
                    number,
                    InputError(f"{path}, line {number}: not valid UTF-8 (byte {error.start + 1} of the line)"),
                )
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}, after line {number}: the gzip file is damaged or cut short: {error}") from None


def _text_lines(path: Path, stream: BinaryIO, longest: int = LONGEST_RECORD) -> Iterator[str]:
    """The lines of a file of which each is needed to understand the next."""
    for _, line in _lines(path, stream, longest):
        if isinstance(line, InputError):
            raise line
        yield line


def _parse_json(path: Path, line: int | None, text: str) -> Any:
    """The value of a JSON text that starts at `line`, or is the whole file where that is None."""
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        column = "" if line is None else f" at column {error.colno}"
        raise InputError(f"{path}, line {line or error.lineno}: not valid JSON: {error.msg}{column}") from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise InputError(f"{path}{_line(line)}: not valid text: {half} is half of a surrogate pair") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}{_line(line)}: JSON that cannot be read: {shortened_text(error, 200)}") from None
    return value


def _line(number: int | None) -> str:
    return "" if number is None else f", line {number}"


def _object(path: Path, line: int, value: Any) -> Record | InputError:
    if not isinstance(value, dict):
        place = Record({}, path, line).place
        return InputError(f"{place}: a record must be a JSON object, not {type(value).__name__}")
    record = Record(value, path, line)
    try:
        check_depth(value)
    except ForeignTextError as error:
        return InputError(f"{record.place}: {error}")
    return record


def _read_jsonl(path: Path, stream: BinaryIO) -> Iterator[Record | InputError]:
    for number, line in _lines(path, stream):
        if isinstance(line, InputError):
            yield line
        elif line.strip():
            try:
                yield _object(path, number, _parse_json(path, number, line))
            except InputError as error:
                yield error


def _read_json(path: Path, stream: BinaryIO) -> Iterator[Record | InputError]:
    document = _parse_json(path, None, _whole(path, stream))
    if not isinstance(document, list):
        raise InputError(f"{path}: a .json file holds a list of records; one record a line is a .jsonl file")
    for number, value in enumerate(document, start=1):
        yield _object(path, number, value)


def _whole(path: Path, stream: BinaryIO) -> str:
    """The text of a file that is read as a whole. One that is packed is bounded by what it may unfold to."""
    if path.stat().st_size > _LARGEST_WHOLE:
        raise InputError(f"{path}: larger than {_LARGEST_WHOLE >> 20} MiB, as a whole; make it a .jsonl file")
    return "".join(_text_lines(path, stream, _LARGEST_WHOLE))


def _read_text(path: Path, stream: BinaryIO) -> Iterator[Record]:
    """Paragraphs: blocks of lines with blank lines between."""
    block: list[str] = []
    start, size = 1, 0
    for number, line in enumerate(_text_lines(path, stream), start=1):
        if line.strip():
            if not block:
                start, size = number, 0
            block.append(line)
            size += len(line)
            if size > LONGEST_RECORD:
                raise InputError(f"{path}, line {start}: a paragraph longer than {LONGEST_RECORD >> 20} MiB")
        elif block:
            yield Record({"text": "".join(block).strip()}, path, start)
            block = []
    if block:
        yield Record({"text": "".join(block).strip()}, path, start)
