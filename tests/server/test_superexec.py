"""What becomes of a run whose ServerApp dies: real processes stand in for ServerApps, and there is no SuperLink."""

from __future__ import annotations

import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from subprocess import Popen
from types import SimpleNamespace

import psutil
import pytest
import yaml

import core_training.foundation.environment  # noqa: F401 - before Flower is imported
from core_training.foundation import background
from core_training.foundation.errors import RunError
from core_training.foundation.kept_processes import log_of
from core_training.runs import events
from core_training.runs.run_folder import RunFolder
from flower_transport.operator import NoAnswer
from server import superexec
from server.evaluation_requests import Request, ask_for, is_pending
from server.federation import Federation, open_federation
from server.superexec import SuperExec
from tests.server.processes import kill

SLEEP = "import time; time.sleep(60)"
DIE = "raise SystemExit(3)"


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    """A federation with one wanted run, `monday`."""
    (tmp_path / "federation.yaml").write_text(yaml.safe_dump({"port": 9092}))
    (tmp_path / "runs/monday").mkdir(parents=True)
    recipe = {
        "model": {"name_or_path": "tiny"},
        "stage": "pretrain",
        "data": {"train": "notes"},
        "topology": {"kind": "federated", "rounds": 3, "local_steps": 1},
    }
    (tmp_path / "runs/monday/recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "run").mkdir()
    federation = open_federation(tmp_path)
    federation.want("monday")
    return federation


class Started(SuperExec):
    """A SuperExec whose ServerApps carry out `code`; they hold the run's lock as the real ones do."""

    def __init__(self, federation: Federation, code: str) -> None:
        super().__init__(federation)
        self.code = code
        self.starts = 0

    def _start_app(self, run_id: str) -> Popen[bytes]:
        self.starts += 1
        command = [sys.executable, "-c", self.code]
        folder = self._federation.folder
        return background.start(command, self._federation.run_lock(run_id), log_of(folder, "serverapp"))

    def tend(self, seconds: float = 20.0) -> None:
        """Tend the run until it is not wanted any more."""
        deadline = time.monotonic() + seconds
        while self._federation.is_wanted("monday"):
            assert time.monotonic() < deadline
            self._tend("monday")
            time.sleep(0.02)


def failures(federation: Federation) -> list[str]:
    return [event["reason"] for event in RunFolder(federation.runs / "monday").lines("failed")]


def test_a_run_whose_process_is_killed_is_taken_up_again(federation: Federation) -> None:
    executor = Started(federation, SLEEP)
    executor._tend("monday")
    try:
        first = background.owner(federation.run_lock("monday"))
        kill(federation.run_lock("monday"))
        deadline = time.monotonic() + 20
        while background.owner(federation.run_lock("monday")) in (None, first):
            assert time.monotonic() < deadline
            executor._tend("monday")
        assert failures(federation) == []
    finally:
        background.stop(federation.run_lock("monday"))


def test_a_run_whose_processes_die_over_and_over_in_the_same_round_ends_with_a_reason(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superexec, "_BACK_OFF_SECONDS", (0.0, 0.0))
    executor = Started(federation, DIE)
    executor.tend()
    assert executor.starts == 3
    (reason,) = failures(federation)
    assert reason.startswith("its process ended with code 3, 3 times after round 0; ")
    assert "serverapp.log" in reason
    executor._tend("monday")
    assert executor.starts == 3


def test_a_run_whose_process_is_stopped_with_its_superlink_is_taken_up_as_often_as_that_happens(
    federation: Federation,
) -> None:
    executor = Started(federation, "raise SystemExit(0)")
    deadline = time.monotonic() + 60
    while executor.starts < 5:
        assert time.monotonic() < deadline
        executor._tend("monday")
        time.sleep(0.02)
    assert failures(federation) == []
    background.stop(federation.run_lock("monday"))


def test_a_run_that_ended_with_a_reason_of_its_own_is_left_alone(federation: Federation) -> None:
    executor = Started(federation, f"import os; os.unlink({str(federation.folder / 'run/monday.wanted')!r})")
    executor.tend()
    deadline = time.monotonic() + 20
    while background.owner(federation.run_lock("monday")) is not None:
        assert time.monotonic() < deadline
    executor._tend("monday")
    assert executor.starts == 1
    assert failures(federation) == []


def test_a_run_that_ended_with_reasons_of_its_own_is_tried_as_often_as_it_is_wanted(federation: Federation) -> None:
    wanted = federation.folder / "run/monday.wanted"
    executor = Started(federation, f"import os; os.unlink({str(wanted)!r}); raise SystemExit(1)")
    for number in range(1, 6):
        federation.want("monday")
        executor.tend()
        deadline = time.monotonic() + 20
        while background.owner(federation.run_lock("monday")) is not None:
            assert time.monotonic() < deadline
        executor._tend("monday")
        assert executor.starts == number
    assert failures(federation) == []


def test_a_run_that_is_finished_is_wanted_no_longer(federation: Federation) -> None:
    (federation.runs / "monday/summary.json").write_text('{"status": "completed"}')
    executor = Started(federation, SLEEP)
    executor.tend()
    assert executor.starts == 0


def test_a_finished_run_is_taken_up_for_a_question_and_let_go_where_its_processes_die(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superexec, "_BACK_OFF_SECONDS", (0.0, 0.0))
    run = federation.runs / "monday"
    (run / "summary.json").write_text('{"status": "completed"}')
    ask_for(run, Request(data="ward", metrics=["loss"]))
    executor = Started(federation, DIE)
    executor.tend()
    assert executor.starts == 3
    assert not is_pending(run, "ward")
    assert failures(federation) == [], "the run is as it was"
    (failed,) = RunFolder(run).events(events.EvaluationFailed)
    assert failed.reason.startswith("its process ended with code 3, 3 times")


def test_whoever_takes_the_place_of_a_dead_superexec_starts_no_second_process_for_a_run(federation: Federation) -> None:
    first, second = Started(federation, SLEEP), Started(federation, SLEEP)
    first._tend("monday")
    try:
        second._tend("monday")
        assert second.starts == 0
        kill(federation.run_lock("monday"))
        os.waitpid(first._apps["monday"].pid, 0)
        second._tend("monday")
        assert second.starts == 1
    finally:
        background.stop(federation.run_lock("monday"))


def test_a_superlink_that_does_not_answer_yet_is_waited_for_and_one_that_refuses_ends_the_run(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superexec, "_BACK_OFF_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(superexec, "_DIALS_AGAIN_AFTER", 0.0)
    answers: list[Exception] = [*(NoAnswer("away") for _ in range(5)), *(RunError("no") for _ in range(3))]

    class Refused(Started):
        def _start_app(self, run_id: str) -> Popen[bytes]:
            raise answers.pop(0)

    Refused(federation, SLEEP).tend()
    assert answers == []
    (reason,) = failures(federation)
    assert reason.startswith("no, 3 times")


def test_a_note_of_a_run_whose_folder_is_gone_is_nobodys(federation: Federation) -> None:
    federation.want("tuesday")
    assert federation.wanted() == ["monday"]


def test_what_is_wrong_with_one_run_holds_up_no_other(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    (federation.runs / "friday").mkdir()
    (federation.runs / "friday/recipe.yaml").write_text("damaged: [")
    (federation.runs / "friday/summary.json").mkdir()
    federation.want("friday")
    rounds = iter([None, None])
    monkeypatch.setattr(time, "sleep", lambda _: next(rounds))
    executor = Started(federation, SLEEP)
    try:
        with pytest.raises(StopIteration):
            executor.run()
        assert background.owner(federation.run_lock("monday")) is not None
        assert executor.starts == 1
    finally:
        monkeypatch.undo()
        background.stop(federation.run_lock("monday"))


def test_the_token_of_a_task_is_on_no_command_line(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    superlink = SimpleNamespace(active=dict, start=lambda run_id: 7)
    monkeypatch.setattr(superexec, "control", lambda operator: nullcontext(superlink))
    monkeypatch.setattr(superexec, "take_task", lambda operator, flower_run: f"token-of-{flower_run}")
    app = psutil.Process(SuperExec(federation)._start_app("monday").pid)
    try:
        deadline = time.monotonic() + 20
        while "FEDLOOM_TASK_TOKEN" not in app.environ():  # before it has become another program
            assert time.monotonic() < deadline
        assert app.environ()["FEDLOOM_TASK_TOKEN"] == "token-of-7"
        assert "token-of-7" not in " ".join(app.cmdline())
    finally:
        background.stop(federation.run_lock("monday"))
