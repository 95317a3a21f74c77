"""A site's account on the disk: what is on it, what is not, and what becomes of a damaged one."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from core_training.foundation.errors import InputError, RunError
from core_training.privacy.accounting import Release, epsilon_of
from core_training.privacy.ledger import Budget, BudgetSpentError, PrivacyLedger

RELEASE = Release("record", 0.1, 1.0, 5)


def digest(number: int) -> str:
    return f"{number:064x}"


def test_a_release_is_charged_once_and_lines_come_back_as_written(tmp_path: Path) -> None:
    ledger = PrivacyLedger(tmp_path / "ledger.jsonl")
    assert ledger.lines() == []
    for number in (1, 2, 1):
        ledger.charge("run", number, digest(number), RELEASE)
    ledger.charge("other", 1, digest(1), RELEASE)
    lines = PrivacyLedger(ledger.path).lines()
    assert [(line.run, line.at) for line in lines] == [("run", 1), ("run", 2), ("other", 1)]
    assert all(line.release == RELEASE for line in lines)
    assert ledger.path.stat().st_mode & 0o777 == 0o600


def test_a_line_that_a_kill_cut_off_is_removed(tmp_path: Path) -> None:
    ledger = PrivacyLedger(tmp_path / "ledger.jsonl")
    ledger.charge("run", 1, digest(1), RELEASE)
    whole = ledger.path.read_bytes()
    for cut in range(1, len(whole), 7):
        ledger.path.write_bytes(whole + whole[:cut])
        assert len(ledger.lines()) == 1
        ledger.charge("run", 2, digest(2), RELEASE)
        assert [line.at for line in ledger.lines()] == [1, 2]
        ledger.path.write_bytes(whole)


@pytest.mark.parametrize(
    "damage",
    [
        b"{}\n",
        b"no json\n",
        b'{"run": "a", "at": 1}\n',
        b"x" * 10_000 + b"\n",
        b'{"run":"a","at":1,"digest":"00","unit":"record","sampling_rate":1.0,"noise_multiplier":1.0,"steps":1}\n',
        b'{"run":"a","at":1,"digest":"' + b"0" * 64 + b'","unit":"record","sampling_rate":2.0,'
        b'"noise_multiplier":1.0,"steps":1}\n',
    ],
)
def test_a_damaged_account_releases_nothing_more(tmp_path: Path, damage: bytes) -> None:
    ledger = PrivacyLedger(tmp_path / "ledger.jsonl", Budget("record", 100.0, 1e-5))
    ledger.charge("run", 1, digest(1), RELEASE)
    ledger.path.write_bytes(damage + ledger.path.read_bytes())
    for use in (
        lambda: ledger.charge("run", 2, digest(2), RELEASE),
        lambda: ledger.check(RELEASE),
        ledger.lines,
    ):
        with pytest.raises(RunError, match="line 1: "):
            use()


def test_a_budget_bounds_all_runs_together(tmp_path: Path) -> None:
    budget = Budget("record", epsilon_of([RELEASE] * 3, 1e-5) + 1e-6, 1e-5)
    ledger = PrivacyLedger(tmp_path / "ledger.jsonl", budget)
    for number in range(3):
        ledger.check(RELEASE)
        ledger.charge(f"run {number}", 1, digest(number), RELEASE)
    with pytest.raises(BudgetSpentError, match="is spent"):
        ledger.check(RELEASE)
    with pytest.raises(BudgetSpentError):
        ledger.charge("run 3", 1, digest(3), RELEASE)
    ledger.charge("run 2", 1, digest(2), RELEASE)  # the same bytes again cost nothing
    assert len(ledger.lines()) == 3
    ledger.check(Release("record", 0.1, 1.0, 5), but_for="run 2")
    with pytest.raises(InputError, match="for each record"):
        ledger.check(Release("patient", 0.1, 1.0, 5))


def _charge(path: Path, first: int) -> None:
    for number in range(first, first + 20):
        PrivacyLedger(path).charge("run", number, digest(number), RELEASE)


def test_processes_that_charge_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    processes = [multiprocessing.get_context("spawn").Process(target=_charge, args=(path, 20 * n)) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(line.at for line in PrivacyLedger(path).lines()) == list(range(60))
