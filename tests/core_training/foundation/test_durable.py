"""What is committed is there whole or not at all: after an exception, after a kill, and on a disk that is full."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from core_training.engine.dataset import load_dataset
from core_training.engine.engine import Engine
from core_training.foundation.durable import commit_file, commit_folder, scratch_of
from core_training.foundation.errors import RunError
from core_training.recipe.schema import Recipe
from tests import tiny


@contextmanager
def full_disk(largest_file: int) -> Iterator[None]:
    """While the block runs, the kernel refuses to let this process write a file beyond this many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        with commit_folder(tmp_path / "target") as scratch:
            (scratch / content.decode()).write_bytes(content)
    assert files_in(tmp_path) == {"target/second": b"second"}


def test_an_exception_leaves_the_earlier_folder_and_nothing_else(tmp_path: Path) -> None:
    with commit_folder(tmp_path / "target") as scratch:
        (scratch / "a").write_bytes(b"whole")

    def fail() -> None:
        with commit_folder(tmp_path / "target") as scratch:
            (scratch / "a").write_bytes(b"ha")
            raise KeyError("a defect, not the disk's")

    with pytest.raises(KeyError):
        fail()
    assert files_in(tmp_path) == {"target/a": b"whole"}


def test_a_kill_in_the_middle_leaves_the_earlier_folder_and_the_next_commit_clears_up(tmp_path: Path) -> None:
    with commit_folder(tmp_path / "target") as scratch:
        (scratch / "a").write_bytes(b"whole")
    program = (
        "import os, pathlib\n"
        "from core_training.foundation.durable import commit_folder\n"
        "with commit_folder(pathlib.Path('target')) as scratch:\n"
        "    (scratch / 'a').write_bytes(b'ha')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([p or "." for p in sys.path])}
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=False).returncode == -9
    assert (tmp_path / "target" / "a").read_bytes() == b"whole"
    assert scratch_of(tmp_path / "target").exists()
    with commit_folder(tmp_path / "target") as scratch:
        (scratch / "b").write_bytes(b"new")
    assert files_in(tmp_path) == {"target/b": b"new"}


def test_a_full_disk_leaves_the_earlier_file(tmp_path: Path) -> None:
    target = tmp_path / "summary.json"
    commit_file(target, b"first")
    with (
        pytest.raises(RunError, match=r"summary\.json could not be written .*what was there before is intact"),
        full_disk(10),
    ):
        commit_file(target, b"x" * 11)
    assert files_in(tmp_path) == {"summary.json": b"first"}


def test_a_folder_where_nothing_can_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RunError, match="could not be written"), commit_folder(tmp_path / "file" / "target"):
        pass
    with pytest.raises(RunError, match="could not be written"):
        commit_file(tmp_path / "file" / "target", b"")


@pytest.mark.slow
@pytest.mark.parametrize("stops_at", ["state.safetensors", "notes.json", "loop/progress.pt", "loop/random-0.pt"])
def test_a_full_disk_during_a_checkpoint_leaves_the_previous_one(
    make_recipe: Callable[..., Recipe], tmp_path: Path, stops_at: str
) -> None:
    """Whichever file the disk refuses. From the previous checkpoint the run goes on as if nothing had been."""
    recipe = make_recipe()
    stage = tiny.stage_of(recipe)
    engine = Engine(stage, load_dataset(recipe, stage))
    engine.train(2)
    engine.checkpoint(tmp_path / "step-2", {"steps": 2})
    before = files_in(tmp_path)
    engine.train(2)
    trained = engine.read_state()
    room = refuses_first(before, f"step-2/{stops_at}")
    notes = {"steps": 4, "note": "x" * 100_000 if stops_at == "notes.json" else ""}
    refused = pytest.raises(RunError, match=r"step-4 could not be written .*what was committed before is intact")
    with refused, full_disk(room):
        engine.checkpoint(tmp_path / "step-4", notes)
    assert files_in(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2"]
    assert engine.read_state().digest == trained.digest
    assert engine.restore(tmp_path / "step-2") == {"steps": 2}
    engine.train(2)
    assert engine.read_state().digest == trained.digest
    engine.close()


def refuses_first(files: dict[str, bytes], name: str) -> int:
    """A limit on the size of files that `name` goes beyond, and the ones written before it do not where possible."""
    smaller = [len(data) for other, data in files.items() if other != name and len(data) < len(files[name])]
    return max([*smaller, 0], default=0) if name.endswith("optimizer.pt") else min(len(files[name]) - 1, 60_000)
