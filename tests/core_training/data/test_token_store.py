"""A store gives back what was written, is written once, and is written again when it is damaged."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core_training.data.examples import IGNORED, Example, Tokens
from core_training.data.token_store import TokenStore, TokenWriter, open_store
from core_training.foundation.errors import InputError, RunError

_TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=4).map(
    lambda ids: Tokens(np.array(ids, dtype=np.int64), np.array([IGNORED, *ids][: len(ids)], dtype=np.int64))
)
_EXAMPLES = st.builds(
    Example,
    st.lists(_TOKENS, min_size=1, max_size=2).map(tuple),
    st.dictionaries(st.sampled_from(["margin", "desirable"]), st.floats(allow_nan=False, width=32)),
)


def example(*ids: int, **numbers: float) -> Example:
    return Example((Tokens(np.array(ids), np.array(ids)),), numbers)


def plain(one: Example) -> Any:
    return [(t.input_ids.tolist(), t.labels.tolist()) for t in one.sequences], dict(one.numbers)


def written(folder: Path, examples: Sequence[Example], calls: list[int] | None = None) -> TokenStore:
    def write(writer: TokenWriter) -> dict[str, Any]:
        if calls is not None:
            calls.append(1)
        for index, one in enumerate(examples):
            writer.append(one, index % 3)
        return {"records": len(examples)}

    return open_store(folder, write)


@settings(max_examples=30)
@given(st.lists(_EXAMPLES, max_size=5))
def test_what_was_written_is_read_back(tmp_path_factory: Any, examples: list[Example]) -> None:
    store = written(tmp_path_factory.mktemp("cache") / "a", examples)
    assert [plain(one) for one in store] == [plain(one) for one in examples]
    assert store.lengths.tolist() == [len(one) for one in examples]
    assert store.parts.tolist() == [index % 3 for index in range(len(examples))]
    assert store.notes == {"records": len(examples)}
    assert all(t.input_ids.dtype == t.labels.dtype == np.int64 for one in store for t in one.sequences)


def test_it_is_written_once(tmp_path: Path) -> None:
    calls: list[int] = []
    for _ in range(3):
        written(tmp_path / "a", [example(1, 2)], calls)
    assert len(calls) == 1


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    written(tmp_path / "cache" / "a", [example(1, 2)])
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "cache", tmp_path / "cache" / "a")} == {0o700}
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "cache").rglob("*") if path.is_file()} == {0o600}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [cut, Path.unlink, lambda path: path.write_bytes(b"{}" + path.read_bytes()[2:])])
def test_a_damaged_one_is_written_again(tmp_path: Path, damage: Any) -> None:
    written(tmp_path / "a", [example(1, 2, margin=3.0)])
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    for name in names:
        if name != "index.json" and damage not in (cut, Path.unlink):
            continue  # what a file holds is not looked at again, only its size
        damage(tmp_path / "a" / name)
        calls: list[int] = []
        store = written(tmp_path / "a", [example(1, 2, margin=3.0)], calls)
        assert len(calls) == 1, name
        assert plain(store[0]) == plain(example(1, 2, margin=3.0))


def test_one_that_is_read_is_not_disturbed_when_it_is_replaced(tmp_path: Path) -> None:
    store = written(tmp_path / "a", [example(1, 2)])
    cut(tmp_path / "a" / "index.json")
    written(tmp_path / "a", [example(3, 4)])
    assert plain(store[0]) == plain(example(1, 2))


def test_what_goes_wrong_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def write(writer: TokenWriter) -> dict[str, Any]:
        writer.append(example(1, 2), 0)
        try:
            (tmp_path / "absent").read_text()
        except OSError:
            raise InputError("line 7: wrong") from None

    with pytest.raises(InputError, match="line 7: wrong"):
        open_store(tmp_path / "a", write)
    assert [path.name for path in tmp_path.iterdir()] == [".a.lock"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file could not be made"):
        written(tmp_path / "file" / "a", [])


def test_of_those_that_race_one_writes(tmp_path: Path) -> None:
    """Each opens the lock for itself, so threads stand for processes here."""
    calls: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        many = [pool.submit(written, tmp_path / "a", [example(i, i)] * 200, calls) for i in range(4)]
        stores = [[plain(one) for one in racer.result(30)] for racer in many]
    assert len(calls) == 1
    assert stores == [stores[0]] * 4


_WRITER = """
import sys, time
from pathlib import Path
from core_training.data.token_store import open_store

def write(writer):
    print("writing", flush=True)
    time.sleep(60)

open_store(Path(sys.argv[1]), write)
"""


def test_a_killed_writer_is_in_nobodys_way(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path / "a")], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"writing\n"
    writer.kill()
    writer.communicate()
    assert (tmp_path / ".a.partial").is_dir()
    assert plain(written(tmp_path / "a", [example(3, 4)])[0]) == plain(example(3, 4))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.lock", "a"]
