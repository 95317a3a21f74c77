"""Asynchronous rounds of cohorts' sums: masks change no bit, and nothing is lost to a kill."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest

import server.cohort_rounds
from core_training.foundation.errors import InputError
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.run_folder import RunFolder, Summary
from strategies.cohorts import cohorts_of
from strategies.messages import Envelope
from tests.failing_sites import Fault, federate

MakeRecipe = Callable[..., Recipe]
MASKED = {"secure_aggregation": {"threshold": 0.55, "minimum_sites": 2}}
PLAIN = {"codec": "ring16"}


class Killed(BaseException):
    pass


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> MakeRecipe:
    def make(privacy: Mapping[str, Any] = PLAIN, rounds: int = 6, **topology: Any) -> Recipe:
        return make_recipe(
            simulation={"partition": "iid", "count": 5},
            privacy=privacy,
            topology={"kind": "federated", "rounds": rounds, "local_steps": 1, "buffer": 2, **topology},
        )

    return make


@pytest.fixture(autouse=True)
def alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have chance decide nothing: all sites are taken for equally fast."""

    def without_seconds(
        recipe: Recipe, number: int, idle: Collection[str], parts: Mapping[str, int], seconds: Mapping[str, float]
    ) -> list[list[str]]:
        return cohorts_of(recipe, number, idle, parts, {})

    monkeypatch.setattr(server.cohort_rounds, "cohorts_of", without_seconds)


def run(recipe: Recipe, folder: Path, fault: Fault = lambda *_: None) -> Summary:
    return federate(recipe, folder, fault)


def parts(folder: Path) -> list[dict[str, int]]:
    """How stale each site was in each round."""
    return [{site: part["stale"] for site, part in line["sites"].items()} for line in RunFolder(folder).lines("round")]


def test_masks_change_no_bit_of_an_asynchronous_run(tmp_path: Path, recipe: MakeRecipe) -> None:
    masked, plain = run(recipe(MASKED), tmp_path / "masked"), run(recipe(PLAIN), tmp_path / "plain")
    assert masked.state_digest == plain.state_digest
    assert masked.eval_loss is not None
    assert masked.eval_loss_initial is not None
    assert masked.eval_loss < masked.eval_loss_initial
    assert parts(tmp_path / "masked") == parts(tmp_path / "plain")
    assert all(len(taken) == 2 and len(set(taken.values())) == 1 for taken in parts(tmp_path / "plain"))
    assert {stale for taken in parts(tmp_path / "plain") for stale in taken.values()} > {0}
    assert len({site for taken in parts(tmp_path / "plain") for site in taken}) == 5


@pytest.mark.parametrize("privacy", [MASKED, PLAIN], ids=["masked", "plain"])
@pytest.mark.parametrize("at", [2, 5, 8])
def test_a_server_that_was_killed_asks_the_cohorts_at_work_for_the_same(
    tmp_path: Path, recipe: MakeRecipe, privacy: Mapping[str, Any], at: int
) -> None:
    whole = run(recipe(privacy), tmp_path / "whole")
    asked = 0

    def kill(site: str, order: Envelope) -> None:
        nonlocal asked
        asked += order.kind == "train"
        if asked == at and order.kind == "train":
            raise Killed

    with pytest.raises(Killed):
        run(recipe(privacy), tmp_path / "run", kill)
    resumed = run(recipe(privacy), tmp_path / "run")
    assert resumed.state_digest == whole.state_digest
    assert parts(tmp_path / "run") == parts(tmp_path / "whole")
    assert list(RunFolder(tmp_path / "run").events(events.AskedAgain))


@pytest.mark.parametrize(("at", "void"), [(3, 0), (4, 1)], ids=["before it is opened", "while it is opened"])
def test_what_a_cohort_had_masked_before_a_kill_is_given_again(
    tmp_path: Path, recipe: MakeRecipe, at: int, void: int
) -> None:
    whole = run(recipe(MASKED), tmp_path / "whole")
    asked = 0

    def kill(site: str, order: Envelope) -> None:
        nonlocal asked
        asked += order.kind == "secure" and order.fields["step"] == "unmask"
        if asked == at:  # both of the second cohort have masked; who has helped to open a sum gives nothing twice
            raise Killed

    with pytest.raises(Killed):
        run(recipe(MASKED), tmp_path / "run", kill)
    resumed = run(recipe(MASKED), tmp_path / "run")
    assert (resumed.rounds_done, resumed.void_rounds) == (6, void)
    assert (resumed.state_digest == whole.state_digest) is not bool(void)


def test_a_cohort_that_loses_a_site_is_a_void_round_and_the_others_go_on(tmp_path: Path, recipe: MakeRecipe) -> None:
    lost = []

    def lose(site: str, order: Envelope) -> str | None:
        if order.kind == "train" and not lost:
            lost.append(site)
            return "before"
        return None

    summary = run(recipe(MASKED), tmp_path / "run", lose)
    assert summary.rounds_done == 6
    assert summary.void_rounds == 1
    assert lost[0] in {site for taken in parts(tmp_path / "run") for site in taken}


def test_a_plain_cohort_that_loses_a_site_counts_without_it(tmp_path: Path, recipe: MakeRecipe) -> None:
    lost = []

    def lose(site: str, order: Envelope) -> str | None:
        if order.kind == "train" and not lost:
            lost.append(site)
            return "after"
        return None

    summary = run(recipe(), tmp_path / "run", lose)
    assert summary.void_rounds == 0
    assert sorted(map(len, parts(tmp_path / "run"))) == [1, 2, 2, 2, 2, 2]


def test_a_sum_from_too_long_ago_is_not_opened(tmp_path: Path, recipe: MakeRecipe) -> None:
    assert run(recipe(MASKED, most_stale=0), tmp_path / "run").rounds_done == 6
    assert all(stale == 0 for taken in parts(tmp_path / "run") for stale in taken.values())
    left_out = list(RunFolder(tmp_path / "run").events(events.CohortLeftOut))
    assert left_out
    assert all("topology.most_stale" in event.reason for event in left_out)


def test_who_was_in_the_fewest_rounds_comes_first_with_those_of_its_pace(make_recipe: MakeRecipe) -> None:
    wanted = make_recipe(topology={"kind": "federated", "rounds": 2, "buffer": 2})
    seconds = {"slow": 40.0, "quick": 10.0, "other": 11.0, "lame": 45.0}
    idle = sorted(seconds)
    assert sorted(cohorts_of(wanted, 9, idle, {}, seconds)) == [["lame", "slow"], ["other", "quick"]]
    first, *_ = cohorts_of(wanted, 9, ["quick", "other", "slow"], {"quick": 7, "other": 8, "slow": 3}, seconds)
    assert "slow" in first
    assert cohorts_of(wanted, 9, ["quick"], {}, seconds) == []
    mixed = {tuple(cohort) for number in range(20) for cohort in cohorts_of(wanted, number, idle, {}, {})}
    assert len(mixed) == 6


@pytest.mark.parametrize("said", [0.0, 5e-324, 1e-300, 1e9])
def test_a_pace_that_a_site_makes_up_ends_nothing(make_recipe: MakeRecipe, said: float) -> None:
    wanted = make_recipe(topology={"kind": "federated", "rounds": 2, "buffer": 2})
    cohorts = cohorts_of(wanted, 1, list("abcd"), {}, {"a": said, "b": 1.0, "c": 1e9, "d": 5e-324})
    assert sorted(site for cohort in cohorts for site in cohort) == list("abcd")


@pytest.mark.parametrize("privacy", [MASKED, PLAIN], ids=["masked", "plain"])
def test_a_site_that_fails_each_time_does_not_take_others_with_it_each_round(
    tmp_path: Path, recipe: MakeRecipe, privacy: Mapping[str, Any]
) -> None:
    def fail(site: str, order: Envelope) -> str | None:
        return "before" if site == "site-0" and order.kind == "train" else None

    summary = run(recipe(privacy, rounds=10), tmp_path / "run", fail)
    assert summary.rounds_done == 10
    assert summary.void_rounds <= 3
    assert {site for taken in parts(tmp_path / "run") for site in taken} == {f"site-{n}" for n in range(1, 5)}


def test_hidden_sites_take_no_part_in_asynchronous_rounds(recipe: MakeRecipe) -> None:
    private = {"level": "site", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}
    with pytest.raises(InputError, match=r"topology\.buffer: nobody could say beforehand"):
        recipe({**MASKED, "differential_privacy": private})
