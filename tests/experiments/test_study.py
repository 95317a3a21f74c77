"""Proposals: a search that was killed and goes on proposes what an undisturbed one would have."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core_training.recipe.schema import Recipe
from experiments.search.definition import Search, parse_search
from experiments.search.study import Study, ordinal_of, values_of

KEYS = {
    "training.learning_rate": {"low": 1e-5, "high": 1e-1, "log": True},
    "training.weight_decay": {"low": 0, "high": 0.5},
    "training.warmup_steps": {"low": 1, "high": 4},
    "training.lr_scheduler_type": ["constant", "cosine"],
}
SLICES = 9


@pytest.fixture
def make_search(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Search]:
    def make(folder: str, **document: Any) -> Search:
        recipe = make_recipe(data={"train": "records.jsonl"}).model_dump(mode="json")
        given = {"recipe": recipe, "keys": KEYS, "trials": 14, "pruner": "none", **document}
        return parse_search(given, "search.yaml", tmp_path, tmp_path / folder)

    return make


def loss(values: dict[str, Any], slice_number: int) -> float:
    """A made-up loss after so many slices."""
    distance = abs(math.log10(values["training.learning_rate"]) + 3) + values["training.weight_decay"]
    return distance + (values.get("training.lr_scheduler_type") == "constant") + 3.0 / slice_number


def run(study: Study, trial: Any, slices: int = SLICES) -> None:
    """Carry a trial out as the loop does: report slices, end where the pruner says so."""
    for number in range(1, slices + 1):
        trial.report(loss(values_of(trial), number), number)
        if trial.should_prune():
            study.tell(trial, None, "pruned", {})
            return
    study.tell(trial, [loss(values_of(trial), slices)], "complete", {})


def history(study: Study) -> list[tuple[Any, ...]]:
    return [(ordinal_of(one), one.state.name, values_of(one), one.intermediate_values) for one in study.trials]


WAYS = [
    {"sampler": {"name": "tpe", "startup_trials": 4}},
    {"sampler": "random", "pruner": "median"},
    {"sampler": {"name": "tpe", "startup_trials": 4}, "pruner": {"name": "hyperband", "factor": 2}},
    {"sampler": "cma"},
    {"sampler": "grid", "keys": {**{k: v for k, v in KEYS.items() if k == "training.lr_scheduler_type"},
                                 "training.learning_rate": [1e-4, 1e-3, 1e-2],
                                 "training.weight_decay": [0.0, 0.1]}, "trials": 12},
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: str(way["sampler"]) + str(way.get("pruner", "")))
def test_killed_twice_and_gone_on_with_it_proposes_what_it_would_have(
    make_search: Callable[..., Search], way: dict[str, Any]
) -> None:
    whole = Study(make_search("whole", **way))
    while (trial := whole.ask()) is not None:
        run(whole, trial)
    search = make_search("killed", **way)
    study = Study(search)
    for number in range(100):
        if (trial := study.ask()) is None:
            break
        if number in (2, 7):  # killed after four slices; another process takes the search up
            for at in range(1, 5):
                trial.report(loss(values_of(trial), at), at)
            study = Study(search)
            study.ask_again(next(one for one in study.trials if one.state.name == "RUNNING"))
            continue
        run(study, trial)
    assert history(study) == history(whole)
    assert len(history(whole)) == search.trials
    assert [values_of(one) for one in study.best()] == [values_of(one) for one in whole.best()]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_evolution_comes_closer_than_chance_and_leaves_no_pickle(
    make_search: Callable[..., Search], tmp_path: Path, seed: int
) -> None:
    numbers = {key: settings for key, settings in KEYS.items() if key != "training.lr_scheduler_type"}
    later = {}
    for sampler in ("random", "cma"):
        study = Study(make_search(sampler, sampler=sampler, keys=numbers, trials=80, seed=seed))
        while (trial := study.ask()) is not None:
            run(study, trial)
        later[sampler] = [one.value - 3.0 / SLICES for one in study.trials[60:]]
    assert sum(later["cma"]) < sum(later["random"]) / 3
    assert "pickle" not in (text := (tmp_path / "cma" / "journal.log").read_text())
    assert "cma:" not in text


def test_a_process_killed_while_it_asks_leaves_no_gap(make_search: Callable[..., Search]) -> None:
    search = make_search("gap", trials=3, sampler="random")
    study = Study(search)
    run(study, study.ask())
    study._study.ask()  # and killed before it had an ordinal
    study = Study(search)
    study.give_up_unasked()
    while (trial := study.ask()) is not None:
        run(study, trial)
    assert [ordinal_of(one) for one in study.trials] == [0, 1, 2]
    undisturbed = Study(make_search("undisturbed", trials=3, sampler="random"))
    while (trial := undisturbed.ask()) is not None:
        run(undisturbed, trial)
    assert history(study) == history(undisturbed)


def test_a_line_that_a_kill_cut_short_is_passed_over(make_search: Callable[..., Search], tmp_path: Path) -> None:
    search = make_search("torn", trials=2, sampler="random")
    study = Study(search)
    run(study, study.ask())
    before = history(study)
    with (tmp_path / "torn" / "journal.log").open("ab") as journal:
        journal.write(b'{"op_code":4,"worker_id":"x')
    study = Study(search)
    assert history(study) == before
    run(study, study.ask())
    assert len(history(Study(search))) == 2


def test_a_search_with_other_keys_does_not_go_on_with_it(make_search: Callable[..., Search]) -> None:
    Study(make_search("one"))
    Study(make_search("one", trials=30))  # more trials of the same search
    with pytest.raises(Exception, match=r"holds another search \(it differs in seed\); use --out"):
        Study(make_search("one", seed=1))


def test_the_best_of_several_objectives_are_those_that_no_other_beats(make_search: Callable[..., Search]) -> None:
    search = make_search("front", objective=["eval_loss", "seconds.total"], trials=4, sampler="random")
    study = Study(search)
    for values in ([1.0, 4.0], [2.0, 2.0], [3.0, 3.0], [4.0, 1.0]):
        study.tell(study.ask(), values, "complete", {})
    assert [ordinal_of(one) for one in study.best()] == [0, 1, 3]


class Killed(BaseException):
    """Stands for a process's end in the middle of what it does."""


def kill_after(study: Study, writes: int) -> list[int]:
    """Have the process of a study end after so many more writes to the journal; the list has those that were."""
    backend = study._study._storage._backend
    append, done = backend.append_logs, []

    def limited(logs: Any) -> None:
        if len(done) == writes:
            raise Killed
        append(logs)
        done.append(len(logs))

    backend.append_logs = limited
    return done


def take_over_and_ask(study: Study, alive: set[int]) -> Any:
    """What a process does before its next trial; `alive` are Optuna's numbers of trials whose processes live."""
    study.give_up_unasked()
    for one in study.trials:
        if one.state.name == "RUNNING" and one.number not in alive:
            study.ask_again(one)
    return study.ask()


@pytest.mark.parametrize("way", [{"sampler": "random"}, WAYS[-1]], ids=["random", "grid"])
@pytest.mark.parametrize("dead", [1, 2])
def test_killed_after_any_write_of_a_take_over_nothing_is_lost_nor_doubled(
    make_search: Callable[..., Search], way: dict[str, Any], dead: int
) -> None:
    way = {**way, "trials": 4}
    undisturbed = Study(make_search("undisturbed", **way))
    while (trial := undisturbed.ask()) is not None:
        run(undisturbed, trial)
    for writes in range(100):
        search = make_search(f"killed-{writes}", **way)
        study = Study(search)
        running = [study.ask() for _ in range(3)]
        lives = running[dead:]  # the processes of those before are no more
        alive = {one.number for one in lives}
        taking = Study(search)
        done = kill_after(taking, writes)
        try:
            take_over_and_ask(taking, alive)
            finished = True  # and killed with the trial that it has asked for
        except Killed:
            finished = False
            assert len(done) == writes
        after = Study(search)
        asked = []
        while (trial := take_over_and_ask(after, alive)) is not None:
            asked.append(ordinal_of(trial))
            run(after, trial)
        assert sorted(asked) == sorted({0, 1, 2, 3} - {ordinal_of(one) for one in lives}), writes
        for one in lives:
            run(study, one)
        assert history(Study(search)) == history(undisturbed), writes
        if finished:
            assert writes > 5
            return
    pytest.fail("the take-over does not end")


def test_a_process_killed_before_it_takes_over_leaves_the_number_of_a_live_trial_alone(
    make_search: Callable[..., Search],
) -> None:
    study = Study(make_search("live", trials=3, sampler="random"))
    first, second = study.ask(), study.ask()
    study._study._storage.set_trial_user_attr(first._trial_id, "killed", True)  # as far as an earlier version came
    assert [ordinal_of(second), ordinal_of(study.ask()), ordinal_of(study.ask())] == [1, 0, 2]
    assert study.ask() is None
