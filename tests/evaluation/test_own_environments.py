"""An environment is there whole or not at all, whoever makes it and whatever happens to them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from core_training.foundation.errors import InputError, RunError
from evaluation.bridges.own_environments import Maker, OwnEnvironment

_KILLED = """
import os, signal, sys
from pathlib import Path
from tests.evaluation.test_own_environments import kind

def fill(maker):
    (maker.folder / "program").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

kind(fill).ready(Path(sys.argv[1]), print)
"""


def whole(maker: Maker) -> None:
    (maker.folder / "program").write_text("whole")


def kind(fill: object = whole) -> OwnEnvironment:
    return OwnEnvironment(
        name="thing",
        title="Thing",
        size="1 kB",
        option="--thing-env",
        variable="FEDLOOM_THING_ENV",
        pins=("promptfoo.txt",),
        program="program",
        fill=fill,  # type: ignore[arg-type]
    )


@pytest.fixture(autouse=True)
def _may_fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDLOOM_OFFLINE", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FEDLOOM_THING_ENV", raising=False)


def test_it_is_made_once_and_told(tmp_path: Path) -> None:
    told: list[str] = []
    made = kind().ready(None, told.append)
    assert made.parent == tmp_path / "cache" / "fedloom" / "environments"
    assert told == [f"making the environment of Thing in {made} (1 kB, once; it takes some minutes)"]
    assert kind().ready(None, told.append) == made
    assert len(told) == 1


def test_it_appears_in_one_rename(tmp_path: Path) -> None:
    filled: list[int] = []

    def fill(maker: Maker) -> None:
        whole(maker)
        filled.append(maker.folder.stat().st_ino)

    assert kind(fill).ready(tmp_path / "here", print).stat().st_ino == filled[0]


def test_other_pins_are_another_environment() -> None:
    other = OwnEnvironment(**{**kind().__dict__, "pins": ("evidently.txt",)})
    assert kind().place(None) != other.place(None)


def test_a_place_is_named_by_option_before_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDLOOM_THING_ENV", str(tmp_path / "variable"))
    assert kind().ready(None, print) == tmp_path / "variable"
    assert kind().ready(tmp_path / "option", print) == tmp_path / "option"


def test_one_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fails(maker: Maker) -> None:
        whole(maker)
        maker.do("step", [sys.executable, "-c", "print('no such thing'); raise SystemExit(4)"])

    with pytest.raises(RunError, match=r"Thing could not be made: step ended with code 4 and said: no such thing\. It"):
        kind(fails).ready(tmp_path / "here", print)
    assert [path.name for path in tmp_path.iterdir()] == [".here.lock"]
    assert kind().found(tmp_path / "here") is None


def test_a_killed_maker_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    place = tmp_path / "here"
    assert subprocess.run([sys.executable, "-c", _KILLED, str(place)], check=False).returncode == -9
    assert kind().found(place) is None
    assert (kind().ready(place, print) / "program").read_text() == "whole"


def test_two_makers_make_it_once(tmp_path: Path) -> None:
    made: list[str] = []

    def slowly(maker: Maker) -> None:
        made.append("made")
        time.sleep(0.5)
        whole(maker)

    makers = [threading.Thread(target=kind(slowly).ready, args=(tmp_path / "here", print)) for _ in range(3)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert made == ["made"]
    assert (tmp_path / "here" / "program").read_text() == "whole"


def test_what_is_named_and_is_none_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    (tmp_path / "file").write_text("")
    for name in ("mine", "file"):
        with pytest.raises(InputError, match=f"--thing-env: .*{name} is no environment of Thing: it has no program"):
            kind().ready(tmp_path / name, print)
    assert (tmp_path / "mine" / "letter").read_text() == "dear"


def test_nothing_is_fetched_where_nothing_may_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDLOOM_OFFLINE", "1")
    with pytest.raises(InputError, match=r"FEDLOOM_OFFLINE=1 says to fetch nothing.*--thing-env or FEDLOOM_THING_ENV"):
        kind().ready(tmp_path / "here", print)
    assert not list(tmp_path.iterdir())


def test_what_names_a_mirror_is_told_to_those_who_fetch_and_to_nobody_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://mirror/simple")
    monkeypatch.setenv("npm_config_registry", "http://mirror/npm")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    monkeypatch.setenv("HF_TOKEN", "secret")
    code = "import os, sys; open(sys.argv[1], 'w').write(' '.join(sorted(os.environ)))"
    names = {"PIP_INDEX_URL", "npm_config_registry", "HTTPS_PROXY"}

    def fill(maker: Maker) -> None:
        whole(maker)
        maker.fetch("pip", [sys.executable, "-c", code, "fetched"])
        maker.do("tried", [sys.executable, "-c", code, "done"])

    made = kind(fill).ready(tmp_path / "here", print)
    fetched, done = (set((made / name).read_text().split()) for name in ("fetched", "done"))
    assert names <= fetched
    assert not names & done
    assert "HF_TOKEN" not in fetched | done


@pytest.mark.slow
def test_an_index_that_cannot_be_reached_is_told_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    pins = tmp_path / "pins.txt"
    pins.write_text("evidently==0.7.23\n")
    with pytest.raises(RunError, match=r"pip ended with code 1 and said: .*evidently.*bring an environment") as raised:
        kind(lambda maker: maker.install(pins)).ready(tmp_path / "here", print)
    assert "--thing-env or FEDLOOM_THING_ENV" in str(raised.value)
    assert not (tmp_path / "here").exists()
