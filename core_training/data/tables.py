"""Records from tables: CSV and its kin, Excel sheets, Parquet and Arrow; cells have their columns' names."""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from core_training.foundation.errors import InputError

Row = tuple[int, dict[str, Any]]
"""A row's number (of its line, or of the record) and its cells."""

_LONGEST_CELL = 2**31 - 1
"""A report in a cell may be long; what is read is bounded by the memory that a line takes."""


def csv_rows(path: Path, lines: Iterable[str]) -> Iterator[Row | InputError]:
    """The rows behind a header line; for a row with another number of cells than it, an error."""
    csv.field_size_limit(_LONGEST_CELL)
    lines = iter(lines)
    head, reader = next(lines, ""), None
    if "\r" in head.rstrip("\r\n"):
        raise InputError(f"{path}, line 1: its lines end as on old Macs (CR alone); save it with LF or CR+LF")
    try:
        reader = csv.DictReader(chain([head], lines), strict=True, delimiter=_delimiter(head))
        _check_names(path, list(reader.fieldnames or []))
        for row in reader:
            if None in row or None in row.values():
                yield InputError(f"{path}, line {reader.line_num}: not as many cells as the header has columns")
            else:
                yield reader.line_num, row
    except csv.Error as error:
        # The reader counts a record's lines when it has read it: this one starts on the next.
        number = reader.line_num + 1 if reader is not None else 1
        raise InputError(f"{path}, line {number}: not valid CSV: {error}") from None


def _delimiter(head: str) -> str:
    """The sign that parts a header line into most columns; a comma where none parts it."""
    return max(",;\t|", key=lambda sign: len(next(csv.reader([head], delimiter=sign), [])))


def _check_names(path: Path, names: list[str]) -> None:
    if (twice := next((name for name in names if names.count(name) > 1), None)) is not None:
        raise InputError(f"{path}, line 1: column '{twice}' is given twice")


def excel_rows(path: Path) -> Iterator[Row | InputError]:
    """The rows of a workbook's one sheet behind its header; cells are texts as CSV would have them, or true and false.

    Raises InputError for a workbook with several sheets: which one is meant, nobody can say. For a row with more cells
    than the header, or with a formula that nobody has worked out, an error is among the rows.
    """
    from xml.etree.ElementTree import ParseError
    from zipfile import BadZipFile

    from openpyxl.utils.exceptions import InvalidFileException

    damaged = (BadZipFile, InvalidFileException, ParseError, zlib.error, EOFError, KeyError, ValueError, OSError)
    try:
        yield from _sheet_rows(path)
    except damaged as error:
        raise InputError(f"{path}: not an Excel workbook (.xlsx), or a damaged one: {error}") from None


def _sheet_rows(path: Path) -> Iterator[Row | InputError]:
    from openpyxl import load_workbook

    values, written = (load_workbook(path, read_only=True, data_only=only) for only in (True, False))
    try:
        sheets = [sheet for sheet in values.worksheets if any(map(_has_cells, sheet.iter_rows(values_only=True)))]
        if len(sheets) != 1:
            titles = ", ".join(sheet.title for sheet in sheets) or "none"
            raise InputError(f"{path}: a workbook must have one sheet with cells, this has {titles}; save it by itself")
        both = (sheets[0], written[sheets[0].title])
        rows = zip(*(sheet.iter_rows(values_only=True) for sheet in both), strict=False)
        head = next(rows)[0]
        names = ["" if cell is None else str(cell) for cell in head]
        while names and not names[-1]:
            names.pop()
        if "" in names or not names:
            raise InputError(f"{path}, line 1: column {names.index('') + 1 if names else 1} has no name")
        _check_names(path, names)
        for number, (cells, formulas) in enumerate(rows, start=2):
            if not _has_cells(formulas):
                continue
            if _has_cells(cells[len(names) :]):
                yield InputError(f"{path}, line {number}: not as many cells as the header has columns")
            elif any(cell is None and formula is not None for cell, formula in zip(cells, formulas, strict=False)):
                yield InputError(f"{path}, line {number}: a formula without a value; open the workbook and save it")
            else:
                yield number, dict(zip(names, map(_text, cells), strict=False))
    finally:
        values.close()
        written.close()


def _has_cells(row: Sequence[Any]) -> bool:
    return any(cell is not None for cell in row)


def _text(cell: Any) -> Any:
    """A cell as CSV would have it."""
    from openpyxl.utils.escape import unescape

    if cell is None:
        return ""
    if isinstance(cell, str):
        return unescape(cell)  # a carriage return is written `_x000D_`
    if isinstance(cell, bool):
        return cell
    if isinstance(cell, datetime | date):
        return cell.isoformat().removesuffix("T00:00:00")
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


def parquet_rows(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file."""
    import pyarrow.parquet as pq

    with _named(path, "a Parquet file"):
        yield from _numbered(pq.ParquetFile(path).iter_batches(batch_size=1024))


def arrow_rows(path: Path) -> Iterator[Row]:
    """The rows of an Arrow file, a stream as `datasets` saves it or a file with an index."""
    import pyarrow as pa

    with _named(path, "an Arrow file"), pa.memory_map(str(path)) as source:
        try:
            batches: Iterable[Any] = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            opened = pa.ipc.open_file(source)
            batches = (opened.get_batch(index) for index in range(opened.num_record_batches))
        yield from _numbered(batches)


@contextmanager
def _named(path: Path, kind: str) -> Iterator[None]:
    """Raise InputError for what cannot be read, of which the library says many things."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError, OverflowError, ValueError) as error:
        raise InputError(f"{path}: not {kind}, or a damaged one: {error}") from None


def _numbered(batches: Iterable[Any]) -> Iterator[Row]:
    return enumerate(chain.from_iterable(map(_plain_rows, batches)), start=1)


def _plain_rows(batch: Any) -> Iterator[dict[str, Any]]:
    columns = [_plain(column.to_pylist(), column.type) for column in batch.columns]
    return (dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True))


def _plain(values: list[Any], kind: Any) -> list[Any]:
    """Values of an Arrow type as JSON would have them.

    Structs are the union of all that the rows have: what a row lacks is null there, and is left out. `datasets` keeps
    what differs more than that as texts of JSON.
    """
    import pyarrow as pa

    if isinstance(kind, pa.JsonType):
        return [None if one is None else json.loads(one) for one in values]
    if pa.types.is_struct(kind):
        parts = {
            part.name: _plain([None if one is None else one[part.name] for one in values], part.type) for part in kind
        }
        return [
            None if one is None else {name: part[i] for name, part in parts.items() if part[i] is not None}
            for i, one in enumerate(values)
        ]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [None if one is None else _plain(one, kind.value_type) for one in values]
    return values
