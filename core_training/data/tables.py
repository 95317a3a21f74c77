"""Records from tables: CSV and its kin, Excel sheets, Parquet and Arrow; cells have their columns' names."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from core_training.data.arrow_sizes import written_out
from core_training.data.sizes import LONGEST_RECORD, UNFOLDS, most_unfolded
from core_training.foundation.bounded_reading import open_regular, parse_value, shortened_text
from core_training.foundation.errors import InputError
from core_training.foundation.limits import TooMuchError, within

Row = tuple[int, dict[str, Any]]
"""A row's number (of its line, or of the record) and its cells."""

_MOST_ROWS = 2**20
_MOST_CELLS = 50 * 10**6
"""Of an Excel sheet: its rows are Excel's own limit."""
_ROWS_AT_ONCE = 1024
_BATCH_WITHIN = 300.0
"""Seconds for a thousand rows, from a slow disk."""
_BATCH_IN = 4 * 2**30
"""Bytes of memory for a thousand rows."""


def csv_rows(path: Path, lines: Iterable[str]) -> Iterator[Row | InputError]:
    """The rows behind a header line; for a row with another number of cells than it, an error."""
    csv.field_size_limit(LONGEST_RECORD)
    lines = iter(lines)
    head, reader = next(lines, ""), None
    if "\r" in head.rstrip("\r\n"):
        raise InputError(f"{path}, line 1: its lines end as on old Macs (CR alone); save it with LF or CR+LF")
    try:
        counted = _Counted(path, chain([head], lines))
        reader = csv.DictReader(counted, strict=True, delimiter=_delimiter(head))
        _check_names(path, list(reader.fieldnames or []))
        for row in reader:
            counted.size = 0
            if None in row or None in row.values():
                yield InputError(f"{path}, line {reader.line_num}: not as many cells as the header has columns")
            else:
                yield reader.line_num, row
    except csv.Error as error:
        # The reader counts a record's lines when it has read it: this one starts on the next.
        number = reader.line_num + 1 if reader is not None else 1
        raise InputError(f"{path}, line {number}: not valid CSV: {error}") from None


class _Counted:
    """Lines, and the size of those since it was last set to 0: a row goes on over lines until its quotes are closed."""

    def __init__(self, path: Path, lines: Iterable[str]) -> None:
        self._path, self._lines = path, iter(lines)
        self.size = 0

    def __iter__(self) -> Iterator[str]:
        for number, line in enumerate(self._lines, start=1):
            self.size += len(line)
            if self.size > LONGEST_RECORD:
                raise InputError(f"{self._path}, line {number}: a row longer than {LONGEST_RECORD >> 20} MiB ends here")
            yield line


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
    from zipfile import ZipFile

    try:
        with open_regular(path), ZipFile(path) as packed:
            if sum(entry.file_size for entry in packed.infolist()) > most_unfolded(path):
                raise InputError(f"{path}: {UNFOLDS}")
        yield from _sheet_rows(path)
    except (InputError, GeneratorExit):
        raise
    except Exception as error:  # of the archive, of its XML, of cells that are none: they raise this and that
        said = shortened_text(error, 200)
        raise InputError(f"{path}: not an Excel workbook (.xlsx), or a damaged one: {said}") from None


def _sheet_rows(path: Path) -> Iterator[Row | InputError]:
    from openpyxl import load_workbook

    values, written = (load_workbook(path, read_only=True, data_only=only) for only in (True, False))
    try:
        sheets = [sheet for sheet in values.worksheets if any(map(_has_cells, _cells(path, sheet)))]
        if len(sheets) != 1:
            titles = ", ".join(sheet.title for sheet in sheets) or "none"
            raise InputError(f"{path}: a workbook must have one sheet with cells, this has {titles}; save it by itself")
        both = (sheets[0], written[sheets[0].title])
        rows = zip(*(_cells(path, sheet) for sheet in both), strict=False)
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


def _cells(path: Path, sheet: Any) -> Iterator[Sequence[Any]]:
    """A sheet's rows. Raises InputError for more than a sheet has: a number in its file makes up rows that are not."""
    cells = 0
    for number, row in enumerate(sheet.iter_rows(values_only=True), start=1):
        cells += len(row)
        if number > _MOST_ROWS or cells > _MOST_CELLS:
            raise InputError(f"{path}: more than {_MOST_ROWS} rows or {_MOST_CELLS} cells; save it as .csv")
        yield row


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

    with _named(path, "a Parquet file"), open_regular(path):
        yield from _numbered(path, pq.ParquetFile(path).iter_batches(batch_size=_ROWS_AT_ONCE, use_threads=False))


def arrow_rows(path: Path) -> Iterator[Row]:
    """The rows of an Arrow file, a stream as `datasets` saves it or a file with an index."""
    import pyarrow as pa

    with _named(path, "an Arrow file"), open_regular(path), pa.memory_map(str(path)) as source:
        try:
            batches: Iterable[Any] = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            opened = pa.ipc.open_file(source)
            batches = (opened.get_batch(index) for index in range(opened.num_record_batches))
        yield from _numbered(path, batches)


@contextmanager
def _named(path: Path, kind: str) -> Iterator[None]:
    """Raise InputError for what cannot be read, of which the library says many things."""
    import pyarrow as pa

    try:
        yield
    except TooMuchError:
        raise InputError(f"{path}: a thousand of its rows take more than {_BATCH_IN >> 30} GiB: {UNFOLDS}") from None
    except (pa.ArrowException, OverflowError, RecursionError, ValueError) as error:
        raise InputError(f"{path}: not {kind}, or a damaged one: {shortened_text(error, 200)}") from None


def _numbered(path: Path, batches: Iterable[Any]) -> Iterator[Row]:
    return enumerate(_plain_rows(path, iter(batches)), start=1)


def _plain_rows(path: Path, batches: Iterator[Any]) -> Iterator[dict[str, Any]]:
    """The rows of batches whose every offset was looked at: Arrow goes by them without a look of its own.

    Raises InputError, or TooMuchError, where a few bytes stand for a great many: dictionaries, runs.
    """
    unfolded, most = 0.0, most_unfolded(path)
    while True:
        with within(_BATCH_WITHIN, _BATCH_IN):
            if (batch := next(batches, None)) is None:
                return
            batch.validate(full=True)
            unfolded += written_out(batch)
        if unfolded > most:
            raise InputError(f"{path}: {UNFOLDS}")
        for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
            with within(_BATCH_WITHIN, _BATCH_IN):
                rows = _plain_batch(batch.slice(start, _ROWS_AT_ONCE))
            yield from rows


def _plain_batch(batch: Any) -> list[dict[str, Any]]:
    columns = [_plain(column.to_pylist(), column.type) for column in batch.columns]
    return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _plain(values: list[Any], kind: Any) -> list[Any]:
    """Values of an Arrow type as JSON would have them.

    Structs are the union of all that the rows have: what a row lacks is null there, and is left out. `datasets` keeps
    what differs more than that as texts of JSON.
    """
    import pyarrow as pa

    if isinstance(kind, pa.JsonType):
        return [None if one is None else parse_value(one) for one in values]
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
