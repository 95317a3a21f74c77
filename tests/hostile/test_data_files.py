"""Data that is no data, does not end or unfolds without an end is refused, in bounded time and memory."""

from __future__ import annotations

import gzip
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from openpyxl import Workbook

from core_training.data.records import content_digest, read_records
from core_training.foundation.errors import InputError
from tests.hostile.test_text import refused

Put = Callable[[Path], object]
LINE = 64 * 2**20
"""Bytes of the longest record."""


def packed(piece: bytes, times: int) -> Put:
    """A gzip file of so many pieces."""

    def put(path: Path) -> None:
        with gzip.open(path, "wb", compresslevel=1) as file:
            for _ in range(times):
                file.write(piece)

    return put


def sparse(size: int) -> Put:
    """A file of so many zeros, which takes no place on the disk."""

    def put(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return put


def bytes_of(content: bytes) -> Put:
    return lambda path: path.write_bytes(content)


def zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def itself(path: Path) -> None:
    path.symlink_to(path)


MIB = b" " * 2**20
WORDS = (b"word " * 20_000 + b"\n") * (LINE // 100_000 + 1)
LINES: dict[str, tuple[str, Put]] = {
    "a line of two gigabytes": ("x.jsonl", sparse(2 * 2**30)),
    "a line of a terabyte": ("x.jsonl", sparse(2**40)),
    "a cell of two gigabytes": ("x.csv", sparse(2 * 2**30)),
    "a cell of two gigabytes, with tabs": ("x.tsv", sparse(2 * 2**30)),
    "a text of two gigabytes": ("x.txt", sparse(2 * 2**30)),
    "a list of two gigabytes": ("x.json", sparse(2 * 2**30)),
    "a packed line of gigabytes": ("x.jsonl.gz", packed(MIB, 300)),
    "packed empty lines": ("x.jsonl.gz", packed(b"\n" * 2**19, 3)),
    "a packed cell": ("x.csv.gz", packed(MIB, 300)),
    "a packed text": ("x.txt.gz", packed(MIB, 300)),
    "a packed list": ("x.json.gz", packed(MIB, 300)),
    "a quote that is not closed": ("x.csv", bytes_of(b'a,b\n"' + WORDS)),
    "a row that does not end": ("x.csv", bytes_of(b'a,b\n"' + WORDS.replace(b"\n", b'\n","'))),
    "a paragraph that does not end": ("x.txt", bytes_of(WORDS)),
}
JSON_LINES: dict[str, bytes] = {
    "nested lists": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "nested in a record": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "5000 digits": b'{"text": ' + b"9" * 5000 + b"}",
    "half of a pair": b'{"text": "\\ud800"}',
    "no UTF-8": b'{"text": "\xff"}',
    "cut short": b'{"text": "a',
    "a number": b"1",
    "a list": b"[]",
    "null": b"null",
    "an end of a text": b'{"text": "\x00"}',
    "a long key": b'{"' + b"k" * 10_000_000 + b'"',
}
DAMAGED = [
    b"",
    b"\x00" * 1000,
    b"PAR1",
    b"PAR1" + bytes(100) + b"PAR1",
    b"ARROW1\x00\x00",
    b"PK\x03\x04",
    b"\xff" * 1000,
]
KINDS = ["x.jsonl", "x.json", "x.csv", "x.tsv", "x.txt", "x.xlsx", "x.parquet", "x.arrow", "x.jsonl.gz", "x.csv.gz"]


@pytest.fixture
def refusal(tmp_path: Path) -> Callable[[str, Put], str]:
    """The words in which a file of this name and content is refused."""

    def words(name: str, put: Put) -> str:
        put(tmp_path / name)
        return refused(lambda: [None for _ in read_records(tmp_path / name)], InputError)

    return words


@pytest.mark.parametrize("name", LINES)
def test_no_record_is_longer_than_a_machine_holds(
    refusal: Callable[[str, Put], str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file, put = LINES[name]
    if name == "packed empty lines":  # which are read one by one
        monkeypatch.setattr("core_training.data.sizes._UNFOLDED", 2**20)
    assert "MiB" in (said := refusal(file, put)) or "unfolds" in said


@pytest.mark.parametrize("name", JSON_LINES)
@pytest.mark.parametrize("file", ["x.jsonl", "x.json"])
def test_no_line_of_json_is_a_traceback(refusal: Callable[[str, Put], str], file: str, name: str) -> None:
    content = JSON_LINES[name]
    refusal(file, bytes_of(content if file == "x.jsonl" else b"[" + content + b"]" if name != "a list" else b"[1]"))


@pytest.mark.parametrize(
    ("name", "put"),
    [
        ("x.jsonl", bytes_of(b'{"text": ' + b"[" * 100 + b"]" * 100 + b"}")),
        ("x.json", bytes_of(b'[{"text": ' + b"[" * 100 + b"]" * 100 + b"}]")),
    ],
)
def test_no_record_is_nested_deeper_than_what_goes_on_with_it_bears(
    refusal: Callable[[str, Put], str], name: str, put: Put
) -> None:
    assert f"{name}, {'line' if name == 'x.jsonl' else 'record'} 1: it is nested too deeply" in refusal(name, put)


@pytest.mark.parametrize("text", ["[" * 100 + "]" * 100, "[" * 100_000 + "]" * 100_000])
def test_no_json_in_a_table_is_nested_deeper(refusal: Callable[[str, Put], str], text: str) -> None:
    def put(path: Path) -> None:
        table = pa.table({"tools": pa.ExtensionArray.from_storage(pa.json_(pa.string()), pa.array([text]))})
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)

    assert "nested too deeply" in refusal("x.arrow", put)


@pytest.mark.parametrize("put", [os.mkfifo, zero, itself, os.mkdir])
@pytest.mark.parametrize("name", KINDS)
def test_no_data_is_a_pipe_or_without_an_end(refusal: Callable[[str, Put], str], name: str, put: Put) -> None:
    refusal(name, put)


@pytest.mark.parametrize("put", [os.mkfifo, zero])
def test_nothing_without_an_end_is_hashed(tmp_path: Path, put: Put) -> None:
    put(tmp_path / "x.jsonl")
    refused(lambda: content_digest(tmp_path / "x.jsonl"), InputError)


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: f"{content[:6]!r}, {len(content)}")
@pytest.mark.parametrize("name", ["x.xlsx", "x.parquet", "x.arrow", "x.jsonl.gz"])
def test_what_is_no_table_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    if name == "x.jsonl.gz" and not content:
        pytest.skip("a gzip file of nothing")
    refused(lambda: [None for _ in read_records(tmp_path / name)], InputError)


def a_dictionary(size: int, rows: int) -> Put:
    """One text of this size, named by so many rows."""

    def put(path: Path) -> None:
        column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * size]))
        pq.write_table(pa.table({"text": column}), path, compression="zstd", use_dictionary=True)

    return put


def runs(path: Path) -> None:
    """Fifty million rows of one value, in a few thousand bytes."""
    values = pa.repeat(pa.scalar("yes"), 5_000_000)
    pq.write_table(pa.table({"text": pa.chunked_array([values] * 10)}), path, use_dictionary=True)


def nothing_in_rows(path: Path) -> None:
    pq.write_table(pa.table({"text": pa.nulls(50_000_000)}), path)


def packed_arrow(path: Path) -> None:
    table = pa.table({"text": pa.array(["x" * 2**20] * 300)})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(str(path), table.schema, options=options) as writer:
        writer.write_table(table)


def dictionary(size: int, rows: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * size]))


def run_ends(size: int, rows: int) -> pa.Array:
    return pa.RunEndEncodedArray.from_arrays(pa.array([rows], pa.int32()), pa.array(["x" * size]))


def views(size: int, rows: int) -> pa.Array:
    """Lists that are each the same values."""
    values = pa.array(["x" * 1000] * (size // 1000))
    same = pa.array([0] * rows, pa.int32()), pa.array([len(values)] * rows, pa.int32())
    return pa.ListViewArray.from_arrays(*same, values)


def texts_in_one_place(size: int, rows: int) -> pa.Array:
    text = pa.array(["x" * size], pa.string_view())
    return pa.Array.from_buffers(
        pa.string_view(), rows, [None, pa.py_buffer(bytes(text.buffers()[1])[:16] * rows), text.buffers()[2]]
    )


def as_it_is(column: pa.Array) -> pa.Array:
    return column


def in_a_struct(column: pa.Array) -> pa.Array:
    return pa.StructArray.from_arrays([column], names=["content"])


def in_lists(column: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(range(len(column) + 1), pa.int32()), column)


def in_pairs(column: pa.Array) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(column, 2)


def saved(column: pa.Array) -> Put:
    """An Arrow stream of one column."""

    def put(path: Path) -> None:
        table = pa.record_batch([column], names=["text"])
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_batch(table)

    return put


@pytest.mark.parametrize("inside", [as_it_is, in_a_struct, in_lists, in_pairs], ids=lambda inside: inside.__name__)
@pytest.mark.parametrize("many", [dictionary, run_ends, views, texts_in_one_place], ids=lambda many: many.__name__)
def test_no_column_stands_for_more_than_it_is(
    refusal: Callable[[str, Put], str], many: Callable[[int, int], pa.Array], inside: Callable[[pa.Array], pa.Array]
) -> None:
    assert "unfolds" in refusal("x.arrow", saved(inside(many(2**20, 400))))


@pytest.mark.parametrize("inside", [as_it_is, in_a_struct, in_lists, in_pairs], ids=lambda inside: inside.__name__)
@pytest.mark.parametrize("many", [dictionary, run_ends, views, texts_in_one_place], ids=lambda many: many.__name__)
def test_a_column_of_each_kind_is_read(
    tmp_path: Path, many: Callable[[int, int], pa.Array], inside: Callable[[pa.Array], pa.Array]
) -> None:
    column = inside(many(2000, 3000))
    saved(column)(tmp_path / "x.arrow")
    assert [record.fields["text"] for record in read_records(tmp_path / "x.arrow")] == column.to_pylist()


@pytest.mark.parametrize("offset", [200, 100_000_000, -5, 2])
def test_no_offset_of_a_table_leads_out_of_it(refusal: Callable[[str, Put], str], offset: int) -> None:
    """Arrow itself follows it to wherever that is in the process."""

    def put(path: Path) -> None:
        saved(pa.array(["first", "second"]))(path)
        offsets = [(0).to_bytes(4, "little"), (5).to_bytes(4, "little"), (11).to_bytes(4, "little")]
        content = path.read_bytes()
        assert content.count(b"".join(offsets)) == 1
        changed = b"".join([*offsets[:2], offset.to_bytes(4, "little", signed=True)])
        path.write_bytes(content.replace(b"".join(offsets), changed))

    assert "not an Arrow file" in refusal("x.arrow", put)


PARQUET: dict[str, tuple[str, Put]] = {
    "a dictionary of one long text": ("x.parquet", a_dictionary(8 * 2**20, 5000)),
    "a dictionary of texts": ("x.parquet", a_dictionary(2**16, 50_000)),
    "runs of a value": ("x.parquet", runs),
    "rows of nothing": ("x.parquet", nothing_in_rows),
    "packed batches": ("x.arrow", packed_arrow),
}


@pytest.mark.parametrize("name", PARQUET)
def test_no_table_unfolds_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if "rows" in name or "runs" in name:  # of which a machine reads millions a second, one by one
        monkeypatch.setattr("core_training.data.sizes._UNFOLDED", 2**20)
        monkeypatch.setattr("core_training.data.sizes._TIMES", 20)
    file, put = PARQUET[name]
    put(tmp_path / file)
    said = refused(lambda: [None for _ in read_records(tmp_path / file)], InputError)
    assert "unfolds" in said


def a_workbook(path: Path) -> None:
    book = Workbook()
    book.active.append(["text"])
    book.active.append(["a"])
    book.save(path)


def with_part(part: str, change: Callable[[str], str]) -> Put:
    """A workbook, a part of which is another one."""

    def put(path: Path) -> None:
        a_workbook(path)
        with zipfile.ZipFile(path) as old:
            parts = {name: old.read(name) for name in old.namelist()}
        parts[part] = change(parts[part].decode()).encode()
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name, content in parts.items():
                new.writestr(name, content)

    return put


SHEET = "xl/worksheets/sheet1.xml"
ENTITIES = (
    '<!DOCTYPE x [<!ENTITY a0 "ha">'
    + "".join(f'<!ENTITY a{i} "' + f"&a{i - 1};" * 10 + '">' for i in range(1, 12))
    + "]>"
)
WORKBOOKS: dict[str, Put] = {
    "rows that are not": with_part(
        SHEET,
        lambda xml: xml.replace('<dimension ref="A1:A2" />', "").replace('<row r="2"', '<row r="99999999999"'),
    ),
    "columns that are not": with_part(
        SHEET, lambda xml: xml.replace('ref="A1:A2"', 'ref="A1:XFD1048576"').replace('<row r="2"', '<row r="1048576"')
    ),
    "entities of entities": with_part(SHEET, lambda xml: xml.replace("<worksheet", ENTITIES + "<worksheet", 1)
        .replace("<t>a</t>", "<t>&a11;</t>")),
    "megabytes of nothing": with_part(SHEET, lambda xml: xml + " " * (5 * 2**20)),
    "no XML": with_part(SHEET, lambda _: "<oops"),
    "no sheet": with_part("xl/workbook.xml", lambda _: "<workbook/>"),
    "a cell that is none": with_part(SHEET, lambda xml: xml.replace('r="A2"', 'r="??"')),
}  # fmt: skip


@pytest.mark.parametrize("name", WORKBOOKS)
def test_no_workbook_unfolds_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for limit, value in {"sizes._UNFOLDED": 2**20, "tables._MOST_ROWS": 20_000, "tables._MOST_CELLS": 10**6}.items():
        monkeypatch.setattr(f"core_training.data.{limit}", value)
    WORKBOOKS[name](tmp_path / "x.xlsx")
    refused(lambda: [None for _ in read_records(tmp_path / "x.xlsx")], InputError)


def test_one_endless_line_does_not_keep_the_others_from_being_read(tmp_path: Path) -> None:
    """An honest long record is read, and a file of many is as long as it likes."""
    record: dict[str, Any] = {"text": "x" * 10_000_000}
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for _ in range(3)))
    assert sum(1 for _ in read_records(tmp_path / "x.jsonl")) == 3
    with gzip.open(tmp_path / "x.jsonl.gz", "wb") as file:
        file.writelines(b'{"text": "the same words in all of them"}\n' for _ in range(20_000))
    assert sum(1 for _ in read_records(tmp_path / "x.jsonl.gz")) == 20_000
