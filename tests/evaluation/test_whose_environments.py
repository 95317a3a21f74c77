"""An environment that another account could have made or changed is not run; who meets one is told the way out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from core_training.foundation.errors import InputError
from evaluation.bridges.own_environments import OwnEnvironment
from tests.evaluation.test_own_environments import kind

OTHER = 65534


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDLOOM_OFFLINE", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FEDLOOM_THING_ENV", raising=False)


def given_away(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another account")
    os.chown(path, OTHER, OTHER, follow_symlinks=False)


def opened(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o020)


def of_the_world(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o002)


PARTS = {
    "program": lambda folder: folder / "program",
    "folder": lambda folder: folder,
    "environments": lambda folder: folder.parent,
    "fedloom": lambda folder: folder.parent.parent,
    "cache": lambda folder: folder.parent.parent.parent,
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("change", "said"),
    [(given_away, "belongs to"), (opened, "chmod go-w"), (of_the_world, "chmod go-w")],
    ids=["owner", "group", "others"],
)
def test_one_in_the_cache_that_others_could_have_changed_is_not_run(
    change: Callable[[Path], None], said: str, part: str
) -> None:
    thing = kind()
    folder = thing.ready(None, print)
    assert thing.found(None) == folder
    changed = PARTS[part](folder)
    change(changed)
    for ask in (lambda: thing.found(None), lambda: thing.ready(None, print)):
        with pytest.raises(InputError) as raised:
            ask()
        words = str(raised.value)
        assert f"{changed} " in words
        assert said in words
        assert "--thing-env or FEDLOOM_THING_ENV" in words


def test_none_is_made_where_others_could_change_it(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    of_the_world(tmp_path / "cache")
    with pytest.raises(InputError, match="chmod go-w"):
        kind().ready(None, print)
    assert not any((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match=r"cannot be made: .*--thing-env or FEDLOOM_THING_ENV"):
        kind().ready(None, print)


@pytest.mark.parametrize("mark", [None, "{}", "no JSON", '{"environment": "thing", "digest": "0123456789ab"}'])
def test_one_in_the_cache_without_its_mark_is_not_run(mark: str | None) -> None:
    folder = kind().ready(None, print)
    (folder / "made-by-fedloom.json").unlink()
    if mark is not None:
        (folder / "made-by-fedloom.json").write_text(mark)
    with pytest.raises(InputError, match=r"made-by-fedloom\.json.*remove it"):
        kind().found(None)


@pytest.mark.parametrize("part", ["program", "folder"])
@pytest.mark.parametrize("change", [given_away, of_the_world], ids=["owner", "others"])
def test_a_named_one_needs_no_mark_and_is_nobody_elses(
    tmp_path: Path, change: Callable[[Path], None], part: str
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "program").write_text("")
    assert kind().found(mine) == mine
    change(PARTS[part](mine))
    with pytest.raises(InputError, match="--thing-env or FEDLOOM_THING_ENV"):
        kind().found(mine)


def test_a_program_may_be_a_link_to_the_interpreter_that_runs_and_to_no_strangers(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "program").symlink_to(sys.executable)
    assert kind().found(mine) == mine
    (tmp_path / "theirs").write_text("")
    of_the_world(tmp_path / "theirs")
    (mine / "program").unlink()
    (mine / "program").symlink_to(tmp_path / "theirs")
    with pytest.raises(InputError, match="theirs"):
        kind().found(mine)


def test_what_is_made_is_its_makers_alone_whatever_files_are_made_with() -> None:
    def fill(maker: object) -> None:
        folder: Path = maker.folder  # type: ignore[attr-defined]
        (folder / "inner").mkdir()
        (folder / "inner" / "library").write_text("")
        (folder / "program").write_text("")

    before = os.umask(0)
    try:
        thing: OwnEnvironment = kind(fill)
        folder = thing.ready(None, print)
    finally:
        os.umask(before)
    assert thing.found(None) == folder
    assert not any(path.stat().st_mode & 0o022 for path in (folder, *folder.rglob("*")))
