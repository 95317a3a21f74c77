"""The same records come out of every kind of file, and what is wrong in one is named by file and line."""

from __future__ import annotations

import csv
import gzip
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core_training.data.records import data_files, read_records, records_in, source_name
from core_training.foundation.errors import InputError

ROWS = [{"question": "what?", "answer": 'Über\nzwei Zeilen, "quoted"'}, {"question": "ça va?", "answer": "行"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def error_of(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        list(read_records(path))
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith(str(path))
    return str(caught.value).removeprefix(str(path))


def as_csv(folder: Path) -> bytes:
    with (folder / "plain.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["question", "answer"])
        writer.writeheader()
        writer.writerows(ROWS)
    return (folder / "plain.csv").read_bytes()


def test_every_kind_of_file_gives_the_same_records(tmp_path: Path) -> None:
    document = json.dumps(ROWS).encode()
    files = [write(tmp_path, f"a.jsonl{gz}", LINES) for gz in ("", ".gz")]
    files += [write(tmp_path, f"b.json{gz}", document) for gz in ("", ".gz")]
    files += [write(tmp_path, f"c.csv{gz}", as_csv(tmp_path)) for gz in ("", ".gz")]
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    for path in [*files, tmp_path / "d.parquet"]:
        assert [record.fields for record in read_records(path)] == ROWS, path


def test_text_is_read_by_paragraphs(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", b"\none\ntwo\n\n\nthree\n")
    assert [(record.fields["text"], record.line) for record in read_records(path)] == [("one\ntwo", 2), ("three", 6)]


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": 2}')
    assert [(record.fields["a"], record.line) for record in read_records(path)] == [(1, 1), (2, 4)]


@pytest.mark.parametrize(
    ("third_line", "expected"),
    [
        (b'{"question": "what?",', ", line 3: not valid JSON: "),
        (b"question: what?", ", line 3: not valid JSON: Expecting value at column 1"),
        (b'{"a": "\xff\xfe"}', ", line 3: not valid UTF-8 (byte 8 of the line)"),
        (b'["a", "b"]', ", line 3: a record must be a JSON object, not list"),
        (b'{"a": "\\ud800"}', ", line 3: not valid text: \\ud800 is half of a surrogate pair"),
        (b"[" * 100_000, ", line 3: JSON that cannot be read: "),
        (b'{"a": ' + b"9" * 5000 + b"}", ", line 3: JSON that cannot be read: "),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, name: str, third_line: bytes, expected: str) -> None:
    assert error_of(write(tmp_path, name, LINES + third_line + b"\n" + LINES)).startswith(expected)


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_gzip_never_passes_for_a_whole_one(tmp_path_factory: Any, share: float) -> None:
    whole = gzip.compress(b"".join(b'{"a": "%s"}\n' % os.urandom(40).hex().encode() for _ in range(60)))
    path = tmp_path_factory.mktemp("gz") / "cut.jsonl.gz"
    path.write_bytes(whole[: 1 + int(share * (len(whole) - 1))])
    message = error_of(path)
    assert "the gzip file is damaged or cut short" in message


def test_the_line_after_which_a_gzip_breaks_off_is_named(tmp_path: Path) -> None:
    many = b"".join(b'{"a": "%s"}\n' % os.urandom(40).hex().encode() for _ in range(3000))
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(many)[:80_000])
    line = int(error_of(path).split("line ")[1].split(":")[0])
    assert 500 < line < 3000


def test_what_only_calls_itself_gzip_or_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(LINES)
    assert "damaged" in error_of(tmp_path / "a.jsonl.gz")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    assert "not a Parquet file" in error_of(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.json", b'{"a": 1}', ": a .json file holds a list of records"),
        ("a.json", b'[{"a": 1},\n{"a": }]', ", line 2: not valid JSON: "),
        ("a.json", b'[{"a": 1}, 7]', ", record 2: a record must be a JSON object, not int"),
        ("a.csv", b"a,b\n1,2\n3\n", ", line 3: not as many cells as the header has columns"),
        ("a.csv", b"a,b\n1,2\n3,4,5\n", ", line 3: not as many cells"),
        ("a.csv", b'a,b\n1,"2\n', ", line 2: not valid CSV"),
        ("a.csv", b"a,a\n1,2\n", ", line 1: column 'a' is given twice"),
        ("a.csv", b"a,b\n1,\xe9\n", ", line 2: not valid UTF-8"),
        ("a.txt", b"one\n\xc3(\n", ", line 2: not valid UTF-8 (byte 1 of the line)"),
    ],
)
def test_other_kinds_of_files_name_the_place_too(tmp_path: Path, name: str, data: bytes, expected: str) -> None:
    assert error_of(write(tmp_path, name, data)).startswith(expected)


def test_empty_files_hold_no_records(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.jsonl.gz", "a.csv", "a.txt"):
        assert list(read_records(write(tmp_path, name, b""))) == []


def test_patterns_stand_for_sorted_files_each_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.txt", "c.csv.gz"):
        write(tmp_path, name, b"")
    (tmp_path / "notes.md").write_text("not data")
    names = [path.name for path in data_files([str(tmp_path), str(tmp_path / "*.jsonl")])]
    assert names == ["a.txt", "b.jsonl", "c.csv.gz"]
    assert source_name(Path("x/niddk.jsonl.gz")) == "niddk"


def test_a_pattern_that_matches_nothing_or_no_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.jsonl' matches no file"):
        data_files(str(tmp_path / "absent.jsonl"))
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"model\.bin: unknown kind of file; it can be \.jsonl"):
        data_files(str(tmp_path / "model.bin"))


_JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.dictionaries(st.text(), _JSON, max_size=4), max_size=5), zipped=st.booleans())
def test_written_lines_read_back_as_they_were(tmp_path_factory: Any, rows: list[dict[str, Any]], zipped: bool) -> None:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = write(tmp_path_factory.mktemp("rows"), "a.jsonl.gz" if zipped else "a.jsonl", data)
    records = list(read_records(path))
    assert [record.fields for record in records] == rows
    assert [record.line for record in records] == list(range(1, len(rows) + 1))


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200), name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet"]))
def test_no_bytes_end_in_anything_but_records_or_an_input_error(tmp_path_factory: Any, data: bytes, name: str) -> None:
    path = tmp_path_factory.mktemp("bytes") / name
    path.write_bytes(data)
    with suppress(InputError):
        list(read_records(path))


@pytest.mark.parametrize(("name", "sign"), [("d.csv", ","), ("d.csv", ";"), ("d.tsv", "\t"), ("d.csv", "|")])
def test_the_sign_between_columns_is_seen_in_the_header(tmp_path: Path, name: str, sign: str) -> None:
    path = tmp_path / name
    path.write_text(f'question{sign}answer\n"One; two, or three?"{sign}Two\n', encoding="utf-8")
    (record,) = read_records(path)
    assert record.fields == {"question": "One; two, or three?", "answer": "Two"}


def test_a_cell_may_be_as_long_as_a_report(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("text\nshort\n" + "long report " * 15000 + "\n")
    assert [len(record.fields["text"]) for record in read_records(path)] == [5, 180_000]


def test_a_workbook_reads_as_its_csv_would(tmp_path: Path) -> None:
    from datetime import date

    from openpyxl import Workbook

    book = Workbook()
    sheet = book.active
    assert sheet is not None
    for row in (["question", "answer", "label", "seen", None], ["what?", 7, True, date(2024, 5, 6), None], [None] * 5):
        sheet.append(row)
    sheet.append(["ça va?", "行", False, 1.5, None])
    book.create_sheet("empty")
    path = tmp_path / "notes.xlsx"
    book.save(path)
    assert [(record.fields, record.line) for record in read_records(path)] == [
        ({"question": "what?", "answer": "7", "label": True, "seen": "2024-05-06"}, 2),
        ({"question": "ça va?", "answer": "行", "label": False, "seen": "1.5"}, 4),
    ]
    book["empty"].append(["a"])
    book.save(path)
    assert "must have one sheet with cells, this has Sheet, empty" in error_of(path)
    path.write_bytes(b"no workbook")
    assert "not an Excel workbook" in error_of(path)


def test_what_datasets_saved_is_read_from_its_folder(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    saved = Dataset.from_list(ROWS)
    saved.save_to_disk(str(tmp_path / "one"))
    parts = DatasetDict({"train": saved, "test": Dataset.from_list(ROWS[:1])})
    parts.save_to_disk(str(tmp_path / "both"))
    for pattern, rows in (("one", ROWS), ("both", ROWS), ("both/test", ROWS[:1])):
        assert [record.fields for record in records_in(str(tmp_path / pattern))] == rows
    DatasetDict({"test": saved}).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(InputError, match=r"has no part 'train'; name one of its folders: test"):
        data_files(str(tmp_path / "other"))
    (tmp_path / "broken.arrow").write_bytes(b"no arrow")
    assert "not an Arrow file" in error_of(tmp_path / "broken.arrow")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One data set downloaded as files (org/notes), and one that `datasets` has made Arrow files of (org/other)."""
    import datasets
    import huggingface_hub
    from datasets.arrow_writer import ArrowWriter

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    repository = tmp_path / "hub" / "datasets--org--notes"
    files = repository / "snapshots" / ("a" * 40)
    files.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    write(files, "train.jsonl", LINES)
    write(files, "test.jsonl", LINES.splitlines()[0])
    made = tmp_path / "datasets" / "org___other" / "default" / "0.0.0" / ("b" * 40)
    made.mkdir(parents=True)
    features = datasets.Features({"text": datasets.Value("string")})
    with ArrowWriter(path=str(made / "other-train.arrow"), features=features) as writer:
        writer.write({"text": "cached"})
        writer.finalize()
    info = {"builder_name": "json", "dataset_name": "other", "config_name": "default", "version": "0.0.0"}
    splits = {"train": {"name": "train", "num_examples": 1, "num_bytes": 1, "dataset_name": "other"}}
    datasets.DatasetInfo(features=features, splits=splits, **info).write_to_directory(str(made))
    return tmp_path


@pytest.mark.usefixtures("hub_cache")
def test_a_name_on_the_hub_stands_for_what_was_downloaded() -> None:
    assert [record.fields for record in records_in("org/notes")] == ROWS
    assert [record.fields for record in records_in("org/notes:test")] == ROWS[:1]
    assert [record.fields for record in records_in("org/other")] == [{"text": "cached"}]
    with pytest.raises(InputError, match=r"no part 'valid', but train, test"):
        data_files("org/notes:valid")
    with pytest.raises(InputError, match=r"not in the cache of this machine .* hf download --repo-type dataset org/no"):
        data_files("org/none")


def test_lines_that_are_no_records_go_to_whoever_asks_for_them(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", b'{"text": "one"}\n{"text": \n[1]\n\xff\n{"text": "two"}\n')
    errors: list[InputError] = []
    assert [record.line for record in read_records(path, errors.append)] == [1, 5]
    assert [str(error).partition(": ")[0].rpartition(" ")[2] for error in errors] == ["2", "3", "4"]
    table = write(tmp_path, "a.csv", b"a,b\n1,2\n1\n3,4\n")
    errors.clear()
    assert [record.fields for record in read_records(table, errors.append)] == [
        {"a": "1", "b": "2"},
        {"a": "3", "b": "4"},
    ]
    assert "line 3: not as many cells" in str(errors[0])
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(LINES)[:-9])
    with pytest.raises(InputError, match="damaged or cut short"):
        list(read_records(cut, errors.append))


def test_a_half_downloaded_data_set_is_refused(hub_cache: Path) -> None:
    files = hub_cache / "hub" / "datasets--org--notes" / "snapshots" / ("a" * 40)
    (files / "train.jsonl").unlink()
    write(files, "train-00000-of-00002.jsonl", LINES)
    with pytest.raises(InputError, match=r"it has 1 of 2 files: the download is not complete"):
        data_files("org/notes")
    write(files, "train-00001-of-00002.jsonl", LINES)
    records = list(records_in("org/notes", most=3))
    assert len(records) == 3
    assert {record.source for record in records} == {"notes"}


def test_numbered_files_of_one_data_set_are_one_source() -> None:
    assert source_name(Path("notes-00001-of-00003.parquet")) == "notes"
    assert source_name(Path("saved/data-00001-of-00003.arrow")) == "saved"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([["question", None, "answer"], ["a", "b", "c"]], "line 1: column 2 has no name"),
        ([[None, None], ["a", "b"]], "line 1: column 1 has no name"),
        ([["question", "answer"], ["a", "b", "c"]], "line 2: not as many cells as the header has columns"),
        ([["question", "answer"], ["a", "=A1"]], "line 2: a formula without a value"),
        ([["question", "question"], ["a", "b"]], "column 'question' is given twice"),
    ],
)
def test_what_is_wrong_in_a_workbook_is_named(tmp_path: Path, rows: list[list[Any]], expected: str) -> None:
    from openpyxl import Workbook

    book = Workbook()
    assert book.active is not None
    for number, row in enumerate(rows, start=1):
        for column, cell in enumerate(row, start=1):
            book.active.cell(number, column, cell)
    book.save(tmp_path / "a.xlsx")
    assert expected in error_of(tmp_path / "a.xlsx")


def test_a_damaged_workbook_is_named(tmp_path: Path) -> None:
    import zipfile

    from openpyxl import Workbook

    book = Workbook()
    assert book.active is not None
    book.active.append(["question", "answer"])
    book.save(tmp_path / "whole.xlsx")
    for part in ("xl/worksheets/sheet1.xml", "xl/workbook.xml", "[Content_Types].xml"):
        with zipfile.ZipFile(tmp_path / "whole.xlsx") as whole, zipfile.ZipFile(tmp_path / "cut.xlsx", "w") as cut:
            for name in whole.namelist():
                content = whole.read(name)
                cut.writestr(name, content[: len(content) // 2] if name == part else content)
        assert "not an Excel workbook (.xlsx), or a damaged one" in error_of(tmp_path / "cut.xlsx")


CALLS = [
    {"name": "weather", "arguments": {"city": "Rome"}},
    {"name": "calc", "arguments": {"expr": "2+2"}},
]
TALKS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    for call in CALLS
]


def test_what_other_rows_have_is_not_in_a_row_of_a_table(tmp_path: Path) -> None:
    """Structs of a column are the union of all rows' keys."""
    pq.write_table(pa.Table.from_pylist(TALKS), tmp_path / "talks.parquet")
    assert [record.fields for record in read_records(tmp_path / "talks.parquet")] == TALKS


def test_what_datasets_keeps_as_json_is_read_as_it_was(tmp_path: Path) -> None:
    """Turns that differ in their keys become texts of JSON there."""
    import datasets

    talks = [
        *TALKS,
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]},
    ]
    path = write(tmp_path, "talks.jsonl", "".join(json.dumps(talk) + "\n" for talk in talks).encode())
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    loaded.save_to_disk(str(tmp_path / "saved"))
    loaded.to_parquet(str(tmp_path / "talks.parquet"))
    for pattern in ("saved", "talks.parquet"):
        assert [record.fields for record in records_in(str(tmp_path / pattern))] == talks


def test_each_of_two_data_sets_of_one_name_is_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    for name in ("notes", "questions"):
        DatasetDict({"train": Dataset.from_list(ROWS * 3)}).save_to_disk(str(tmp_path / name))
        write(tmp_path, f"visits.{name}.jsonl", LINES * 3)
    saved = list(records_in([str(tmp_path / "notes"), str(tmp_path / "questions")], most=4))
    assert [record.source for record in saved] == ["notes"] * 4 + ["questions"] * 4
    files = list(records_in(str(tmp_path / "visits.*.jsonl"), most=4))
    assert [record.source for record in files] == ["visits.notes"] * 4 + ["visits.questions"] * 4


def test_lines_of_old_macs_and_cells_of_carriage_returns(tmp_path: Path) -> None:
    from openpyxl import Workbook

    assert "end as on old Macs (CR alone)" in error_of(write(tmp_path, "mac.csv", b"a,b\r1,2\r"))
    book = Workbook()
    assert book.active is not None
    book.active.append(["text"])
    book.active.append(["one_x000D_\ntwo"])
    book.save(tmp_path / "a.xlsx")
    assert [record.fields for record in read_records(tmp_path / "a.xlsx")] == [{"text": "one\r\ntwo"}]


def test_values_that_python_has_not_are_named(tmp_path: Path) -> None:
    late = pa.array([2**62], type=pa.timestamp("us"))
    pq.write_table(pa.table({"text": ["a"], "seen": late}), tmp_path / "late.parquet")
    assert "not a Parquet file, or a damaged one" in error_of(tmp_path / "late.parquet")
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff")]
    )
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, pa.schema([("text", pa.string())])) as out,
    ):
        out.write_table(pa.table({"text": broken}))
    assert "not an Arrow file, or a damaged one" in error_of(tmp_path / "a.arrow")
