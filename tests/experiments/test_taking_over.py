"""Trials of dead processes are taken over by whoever asks next: charged once, and with no wait for those that live."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest

from core_training.foundation.background import claim
from core_training.privacy.accounting import Release
from core_training.privacy.ledger import LEDGER_FILE, PrivacyLedger
from core_training.recipe.schema import Recipe
from experiments.running import OnProgress
from experiments.search.carrying_out import _Work
from experiments.search.definition import Search, parse_search
from experiments.search.study import Study, ordinal_of


@pytest.fixture
def search(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Search:
    given = {
        "recipe": make_recipe(data={"train": "records.jsonl"}).model_dump(mode="json"),
        "keys": {"training.learning_rate": {"low": 1e-4, "high": 1e-1}},
        "trials": 12,
        "sampler": "random",
        "pruner": "none",
    }
    return parse_search(given, "search.yaml", tmp_path, tmp_path / "search")


def work(search: Search) -> _Work:
    silent: OnProgress = lambda *_: None  # noqa: E731
    return _Work(search, Study(search), lambda _: nullcontext(silent), lambda *_: None)


def test_a_killed_trial_is_charged_before_it_is_asked_again_and_once(search: Search) -> None:
    Study(search).ask()
    folder = search.output / "trials" / "0000"
    folder.mkdir(parents=True)
    PrivacyLedger(folder / LEDGER_FILE).charge("r", 3, "a" * 64, Release("record", 0.5, 1.0, 3))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    taking = work(search)
    taking._study._study._storage._backend.append_logs = killed
    with pytest.raises(KeyboardInterrupt):
        taking._ask()
    whole = PrivacyLedger(search.output / LEDGER_FILE)
    assert [(line.run, line.steps) for line in whole.lines()] == [("trial-0000", 3)]
    asked, others = work(search)._ask()
    assert asked is not None
    with asked[1]:
        assert (ordinal_of(asked[0]), others) == (0, 0)
        assert len(whole.lines()) == 1
        assert [path.name for path in (search.output / "trials").iterdir()] == [".0000.running"]


def test_live_trials_are_not_waited_for(search: Search) -> None:
    study = Study(search)
    with ExitStack() as alive:
        for _ in range(6):
            trial = study.ask()
            alive.enter_context(claim(search.output / "trials" / f".{ordinal_of(trial):04d}.running"))
        study.ask()  # and killed
        mine = work(search)
        began = time.monotonic()
        asked, others = mine._ask()
        assert time.monotonic() - began < 1.0
        assert asked is not None
        with asked[1]:
            assert (ordinal_of(asked[0]), others) == (6, 6)
