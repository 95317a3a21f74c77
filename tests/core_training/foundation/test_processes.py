"""A function in several processes: in order, and never waited for in vain."""

from __future__ import annotations

import os
from itertools import count, islice

import pytest

from core_training.foundation import processes
from core_training.foundation.errors import RunError
from core_training.foundation.processes import available_cores, in_processes


def test_results_come_in_order_from_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_ALONE", 10)
    found = list(in_processes(lambda value: (value * 2, os.getpid()), range(3000), 2))
    assert [double for double, _ in found] == [2 * value for value in range(3000)]
    workers = {pid for _, pid in found[10:]}
    assert os.getpid() not in workers
    assert len(workers) <= 2


def test_values_are_asked_for_as_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_ALONE", 10)
    assert list(islice(in_processes(abs, count(), 2), 2000)) == list(range(2000))


def test_a_process_that_dies_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_ALONE", 10)
    with pytest.raises(RunError, match="was ended from outside"):
        list(in_processes(lambda value: os._exit(9) if value == 500 else value, range(1000), 2))


def test_there_is_a_core() -> None:
    assert available_cores() >= 1
