"""A verdict is not well where something is wrong: each way to be wrong is put before it once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.faults import trial
from tests.faults.cells import CELLS, Cell
from tests.faults.page import page
from tests.faults.points import FEDERATED, GOSSIP
from tests.faults.strikes import FAULTS, Fault
from tests.faults.trial import Trials, Verdict
from tests.faults.world import Outcome, Run

CELL = Cell("gossip", False, "node", "training", "kill")
WELL = Outcome(
    results={"a": "1", "b": "1"},
    missing=[],
    state="s",
    counted_wrong=False,
    void=0,
    late=0,
    all_took_part=True,
    ended=0.0,
)


class StandInRun(Run):
    def __init__(self, outcome: Outcome, *, ends: bool) -> None:
        self._outcome = outcome
        self._ends = ends

    def is_over(self) -> bool:
        return self._ends

    def go_on(self) -> None:
        return None

    def outcome(self) -> Outcome:
        return self._outcome


class StandInWorld:
    """A world in which the first run is an undisturbed one, and each later one as it is told."""

    def __init__(self) -> None:
        self.next = StandInRun(WELL, ends=True)
        self.left: tuple[list[str], list[str]] = ([], [])
        self.refuses = ""

    def begin(self, *, masked: bool) -> Run:
        return self.next

    def settle(self) -> list[str]:
        if self.refuses:
            raise RuntimeError(self.refuses)
        return []

    def leftovers(self) -> tuple[list[str], list[str]]:
        return self.left


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Verdict]:
    """The verdict on a run with this outcome, over a world with these attributes."""

    @contextmanager
    def strike(*_: object) -> Iterator[None]:
        yield

    def verdict_on(
        outcome: Outcome, *, cell: Cell = CELL, ends: bool = True, passed: bool = False, **world: Any
    ) -> Verdict:
        made = StandInWorld()
        monkeypatch.setitem(trial.WORLDS, cell.topology, lambda: made)
        monkeypatch.setitem(FAULTS, "kill", Fault("kill", "", 0, strike))
        for points in (GOSSIP, FEDERATED):
            point = replace(points["training"], begun=lambda run: True, passed=lambda run: passed)
            monkeypatch.setitem(points, "training", point)
        monkeypatch.setattr(trial, "_ENDS_WITHIN", 0.2)
        trials = Trials(cell.topology)
        trials._undisturbed[cell.masked] = trials._run_undisturbed(masked=cell.masked)
        made.next = StandInRun(outcome, ends=ends)
        for name, value in world.items():
            setattr(made, name, value)
        return trials.try_cell(cell)

    return verdict_on


def test_a_run_in_which_all_is_as_it_should_be_is_well(judge: Callable[..., Verdict]) -> None:
    assert judge(WELL).is_well
    assert judge(replace(WELL, state="another", all_took_part=False)).is_well


def test_a_masked_run_may_end_without_the_site_that_was_hit_and_no_other(judge: Callable[..., Verdict]) -> None:
    masked = Cell("federated", True, "worker", "training", "kill")
    away = judge(replace(WELL, missing=["north"]), cell=masked)
    assert away.is_well
    assert away.without == ["north"]
    assert "no result at north" in page({masked.name: {**away.document(), "cell": vars(masked)}})
    assert judge(replace(WELL, missing=["north", "south"]), cell=masked).lost
    assert judge(replace(WELL, missing=["north"]), cell=replace(masked, masked=False)).lost


@pytest.mark.parametrize(
    ("what", "outcome", "around"),
    [
        ("lost", replace(WELL, missing=["b"]), {}),
        ("wrong", replace(WELL, results={"a": "1", "b": "2"}), {}),
        ("wrong", replace(WELL, state="another"), {}),
        ("wrong", replace(WELL, counted_wrong=True), {}),
        ("hung", WELL, {"ends": False}),
        ("orphans", WELL, {"left": (["python -m client.worker"], [])}),
        ("locks", WELL, {"left": ([], ["a/run/worker.lock"])}),
        ("locks", WELL, {"refuses": "node is running already (process 7); stop it first"}),
        ("lost", WELL, {"refuses": "the federation does not come up"}),
        ("missed", WELL, {"passed": True}),
    ],
)
def test_what_is_wrong_is_said_and_counted(
    judge: Callable[..., Verdict], what: str, outcome: Outcome, around: dict[str, Any]
) -> None:
    verdict = judge(outcome, **around)
    assert not verdict.is_well
    assert getattr(verdict, what)
    document = verdict.document()
    assert f"**{what}**" in page({CELL.name: {**document, "cell": vars(CELL)}})


def test_every_cell_is_there_once_and_can_be_carried_out() -> None:
    names = [cell.name for cell in CELLS]
    assert len(names) == len(set(names)) >= 150
    for cell in CELLS:
        assert cell.point in (FEDERATED if cell.topology == "federated" else GOSSIP)
        assert cell.fault in FAULTS
