"""Reading records from the files people have, one at a time, and naming file and line where one is wrong.

Knows nothing of stages or tokens: a record is a mapping of column names to values.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from core_training.foundation.errors import InputError
from core_training.recipe.llamafactory_data import names_data_set, read_entry

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")

_LONGEST_CELL = 2**31 - 1
"""A report in a cell may be long; what is read is bounded by the memory that a line takes."""


@dataclass(frozen=True)
class Record:
    """One record, where it stood, and the name of its source (the file's name without suffixes)."""

    fields: dict[str, Any]
    path: Path
    line: int

    @property
    def place(self) -> str:
        unit = "record" if _kind(self.path) in (".json", ".parquet") else "line"
        return f"{self.path}, {unit} {self.line}"

    @property
    def source(self) -> str:
        return source_name(self.path)


def source_name(path: Path) -> str:
    """`niddk` for `…/niddk.jsonl.gz`."""
    return path.name.split(".")[0] or path.name


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
        if path.is_dir():
            matches = sorted(p for p in path.iterdir() if _kind(p) is not None)
        else:
            matches = [path] if path.exists() else sorted(Path(match) for match in glob.glob(pattern, recursive=True))
        if not matches:
            raise InputError(f"data: '{pattern}' matches no file (paths are relative to {Path.cwd()})")
        for match in matches:
            if _kind(match) is None:
                raise InputError(f"data: {match}: unknown kind of file; it can be {' '.join(SUFFIXES)} (text also .gz)")
            found[match] = None
    return list(found)


def read_records(path: Path) -> Iterator[Record]:
    """The records of one file (or of what else `data_files` gives), in order. All but .json is read piece by piece.

    Raises InputError, naming file and line, for what is not UTF-8, not JSON, not an object, or cut short.
    """
    if names_data_set(path):
        data_set = read_entry(path)
        records = (record for file in data_files(str(data_set.path)) for record in read_records(file))
        yield from (replace(record, fields=data_set.fields(record.fields)) for record in islice(records, data_set.most))
        return
    kind = _kind(path)
    try:
        if kind == ".parquet":
            yield from _read_parquet(path)
            return
        with _open(path) as stream:
            if kind == ".jsonl":
                yield from _read_jsonl(path, stream)
            elif kind == ".json":
                yield from _read_json(path, stream)
            elif kind in (".csv", ".tsv"):
                yield from _read_csv(path, stream)
            else:
                yield from _read_text(path, stream)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: the gzip file is damaged or cut short: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def content_digest(path: Path) -> bytes:
    """SHA-256 over all that decides the records of a file (or of what else `data_files` gives)."""
    if names_data_set(path):
        data_set = read_entry(path)
        files = data_files(str(data_set.path))
        described = repr((data_set.most, sorted(data_set.columns.items()), sorted((data_set.tags or {}).items())))
        content = b"".join(content_digest(file) for file in files)
        return hashlib.sha256(described.encode() + content).digest()
    try:
        with path.open("rb") as stream:
            return hashlib.sha256(path.name.encode() + hashlib.file_digest(stream, "sha256").digest()).digest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _kind(path: Path) -> str | None:
    name = path.name.removesuffix(".gz")
    suffix = Path(name).suffix
    return suffix if suffix in SUFFIXES and not (suffix == ".parquet" and path.suffix == ".gz") else None


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path, stream: BinaryIO) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        for number, line in enumerate(stream, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}, line {number}: not valid UTF-8 (byte {error.start + 1} of the line)"
                ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}, after line {number}: the gzip file is damaged or cut short: {error}") from None


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
        raise InputError(f"{path}{_line(line)}: JSON that cannot be read: {error}") from None
    return value


def _line(number: int | None) -> str:
    return "" if number is None else f", line {number}"


def _object(path: Path, line: int, value: Any) -> Record:
    if not isinstance(value, dict):
        place = Record({}, path, line).place
        raise InputError(f"{place}: a record must be a JSON object, not {type(value).__name__}")
    return Record(value, path, line)


def _read_jsonl(path: Path, stream: BinaryIO) -> Iterator[Record]:
    for number, line in _lines(path, stream):
        if not line.strip():
            continue
        yield _object(path, number, _parse_json(path, number, line))


def _read_json(path: Path, stream: BinaryIO) -> Iterator[Record]:
    document = _parse_json(path, None, "".join(line for _, line in _lines(path, stream)))
    if not isinstance(document, list):
        raise InputError(f"{path}: a .json file holds a list of records; one record a line is a .jsonl file")
    for number, value in enumerate(document, start=1):
        yield _object(path, number, value)


def _read_csv(path: Path, stream: BinaryIO) -> Iterator[Record]:
    csv.field_size_limit(_LONGEST_CELL)
    lines = (line for _, line in _lines(path, stream))
    head = next(lines, "")
    reader = csv.DictReader(chain([head], lines), strict=True, delimiter=_delimiter(head))
    try:
        names = list(reader.fieldnames or [])
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"{path}, line 1: column '{twice}' is given twice")
        for row in reader:
            if None in row or None in row.values():
                raise InputError(f"{path}, line {reader.line_num}: not as many cells as the header has columns")
            yield Record(row, path, reader.line_num)
    except csv.Error as error:
        # The reader counts a record's lines when it has read it: this one starts on the next.
        raise InputError(f"{path}, line {reader.line_num + 1}: not valid CSV: {error}") from None


def _delimiter(head: str) -> str:
    """The sign that parts a header line into most columns; a comma where none parts it."""
    return max(",;\t|", key=lambda sign: len(next(csv.reader([head], delimiter=sign), [])))


def _read_text(path: Path, stream: BinaryIO) -> Iterator[Record]:
    """Paragraphs: blocks of lines with blank lines between."""
    block: list[str] = []
    start = 1
    for number, line in _lines(path, stream):
        if line.strip():
            if not block:
                start = number
            block.append(line)
        elif block:
            yield Record({"text": "".join(block).strip()}, path, start)
            block = []
    if block:
        yield Record({"text": "".join(block).strip()}, path, start)


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield Record(row, path, number)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: not a Parquet file: {error}") from None
