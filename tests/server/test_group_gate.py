"""Federations whose groups are gated: what spoils the held-out loss is left out, and what fails changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core_training.foundation.errors import InputError, RunError, VoidRoundsError
from core_training.foundation.state import TrainableState
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.run_folder import RunFolder
from server.run_store import RunStore
from strategies.group_gate import drawn_groups
from strategies.messages import Envelope, Refusal, Vote, VoteOrder
from tests.server.arithmetic_sites import MANIFEST, SiteWithAnAim, federate

MakeRecipe = Callable[..., Recipe]
AIM = 100.0
ROUNDS = 3


class Voter(SiteWithAnAim):
    """Its held-out loss is how far the values are from its aim; `heard` are the orders that it was sent."""

    def __init__(self, number: float, weight: int = 10, aim: float = AIM) -> None:
        super().__init__(number, weight, aim)
        self.heard: list[Envelope] = []

    def __call__(self, order: Envelope) -> Envelope:
        self.heard.append(order)
        return super().__call__(order) if order.kind != "vote" else self.vote(VoteOrder.open(order)).envelope()

    def vote(self, order: VoteOrder) -> Vote:
        start = next(one for one in reversed(self.heard) if one.kind == "train" and one.fields["round"] == order.round)
        return self.ballot(order, [self._loss(start), *map(self._distance, candidates(order))])

    def ballot(self, order: VoteOrder, losses: Sequence[float]) -> Vote:
        whole = [round(loss * 2**16) for loss in losses]
        return Vote(run_id=order.run_id, round=order.round, manifest_digest=order.manifest_digest, ballot=[1, *whole])

    def _distance(self, state: TrainableState) -> float:
        return abs(float(state.buffer[0]) - self.aim)


class Liar(Voter):
    """Says of every mean the opposite of what it measured."""

    def ballot(self, order: VoteOrder, losses: Sequence[float]) -> Vote:
        start, *rest = losses
        return super().ballot(order, [start, *(max(2 * start - loss, 0.0) for loss in rest)])


def candidates(order: VoteOrder) -> list[TrainableState]:
    size = len(order.payload) // order.candidates
    parts = [order.payload[first : first + size] for first in range(0, len(order.payload), size)]
    return [TrainableState.from_bytes(part, MANIFEST) for part in parts]


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> MakeRecipe:
    def make(rule: str = "group_gate", groups: int | None = None, rounds: int = ROUNDS, **sections: Any) -> Recipe:
        topology = {"kind": "federated", "rounds": rounds, "local_steps": 1, **sections.pop("topology", {})}
        gate = {"groups": groups, **sections.pop("gate", {})}
        aggregation = {"rule": rule, "group_gate": gate, **sections.pop("aggregation", {})}
        return make_recipe(topology=topology, aggregation=aggregation, **sections)

    return make


def honest(count: int) -> dict[str, Any]:
    return {f"s{number:02}": Voter(1.0 + 0.001 * number) for number in range(count)}


def moved(run: Path) -> float:
    committed = RunStore(RunFolder(run)).latest()
    assert committed is not None
    return float(np.mean(committed[1].buffer))


def tried(run: Path) -> list[events.GroupsTried]:
    return list(RunFolder(run).events(events.GroupsTried))


@pytest.mark.parametrize("kind", [Voter, Liar])
@pytest.mark.parametrize(
    ("sites", "poisoned", "groups"), [(9, 1, 3), (12, 1, 4), (12, 2, 6), (3, 1, None), (8, 3, None)]
)
def test_poisoned_sites_are_left_out_with_their_groups(
    tmp_path: Path, recipe: MakeRecipe, sites: int, poisoned: int, groups: int | None, kind: type[Voter]
) -> None:
    answers = honest(sites)
    bad = sorted(answers)[:poisoned]
    answers |= {name: kind(-10.0) for name in bad}
    federate(tmp_path / "gate", recipe(groups=groups), dict(answers))
    assert moved(tmp_path / "gate") == pytest.approx(ROUNDS, rel=0.02)
    for event in tried(tmp_path / "gate"):
        for group in event.groups.values():
            assert group["kept"] == (not set(bad) & set(group["sites"]))
    left_out = list(RunFolder(tmp_path / "gate").events(events.GroupLeftOut))
    assert {site for event in left_out for site in bad if site in event.sites} == set(bad)
    assert all(event.rise is not None and event.rise > 0 for event in left_out)
    federate(tmp_path / "mean", recipe("fedavg"), dict(answers))
    assert moved(tmp_path / "mean") < ROUNDS * 0.3


def test_groups_are_those_that_anybody_can_draw_and_the_mean_is_of_the_good_ones_by_weight(
    tmp_path: Path, recipe: MakeRecipe
) -> None:
    answers = {f"s{number}": Voter(1.0 + number, weight=1 + number) for number in range(7)}
    answers["s3"] = Voter(-10.0, weight=5)
    wanted = recipe(groups=3, rounds=1, aggregation={"group_gate": {"groups": 3, "tolerance": 10.0}})
    federate(tmp_path / "run", wanted, dict(answers))
    (event,) = tried(tmp_path / "run")
    groups = list(event.groups.values())
    assert [group["sites"] for group in groups] == drawn_groups(wanted, 1, list(answers))
    kept = [site for group in groups if group["kept"] for site in group["sites"]]
    mean = np.average([answers[site].number for site in kept], weights=[answers[site].weight for site in kept])
    assert moved(tmp_path / "run") == pytest.approx(mean, rel=1e-6)
    for group in groups:
        own = np.average(
            [answers[site].number for site in group["sites"]], weights=[answers[site].weight for site in group["sites"]]
        )
        assert group["rise"] == pytest.approx(-own, abs=1e-3)


def test_a_round_is_evaluated_before_its_vote_though_others_would_not_be(tmp_path: Path, recipe: MakeRecipe) -> None:
    federate(tmp_path / "run", recipe(topology={"eval_every": 100}), honest(3))
    assert moved(tmp_path / "run") == pytest.approx(ROUNDS, rel=0.02)


def test_a_step_beyond_the_mean_begins_at_the_mean_of_the_good_groups(tmp_path: Path, recipe: MakeRecipe) -> None:
    answers = {**honest(8), "s03": Voter(-10.0)}
    federate(tmp_path / "run", recipe(aggregation={"outer": {"step": "momentum"}}), answers)
    assert moved(tmp_path / "run") == pytest.approx(1 + 1.5 + 1.75, rel=0.02)


class BadAtFirst(Voter):
    """Sends ten times its change the other way in round 1."""

    def __call__(self, order: Envelope) -> Envelope:
        self.number = -10.0 if order.fields.get("round") == 1 else 1.0
        return super().__call__(order)


def test_a_round_in_which_all_groups_are_bad_is_void_and_made_up_for(tmp_path: Path, recipe: MakeRecipe) -> None:
    answers = {f"s{number}": BadAtFirst(1.0) for number in range(6)}
    summary = federate(tmp_path / "run", recipe(), dict(answers))
    assert (summary.rounds, summary.void_rounds) == (ROUNDS, 1)
    assert moved(tmp_path / "run") == pytest.approx(ROUNDS)
    (void,) = RunFolder(tmp_path / "run").events(events.RoundVoid)
    assert (void.round, "aggregation.group_gate.most_rise" in void.reason) == (1, True)


def test_a_run_whose_groups_are_all_bad_ends_where_it_began(tmp_path: Path, recipe: MakeRecipe) -> None:
    with pytest.raises(VoidRoundsError, match="3 rounds in a row were void"):
        federate(tmp_path / "run", recipe(), {f"s{number}": Voter(-10.0) for number in range(6)})
    assert moved(tmp_path / "run") == 0


def refusing(voter: Voter, number: int) -> Callable[[Envelope], Envelope]:
    def answer(order: Envelope) -> Envelope:
        refuses = order.kind == "vote" and order.fields["round"] == number
        return Refusal(reason="the disk is full").envelope() if refuses else voter(order)

    return answer


def test_a_vote_without_a_quorum_makes_the_round_void_and_changes_nothing(tmp_path: Path, recipe: MakeRecipe) -> None:
    answers = honest(6)
    mute = {name: refusing(answers[name], 2) for name in list(answers)[:3]}
    summary = federate(tmp_path / "run", recipe(), {**answers, **mute})
    assert (summary.rounds, summary.void_rounds) == (ROUNDS, 1)
    assert moved(tmp_path / "run") == pytest.approx(ROUNDS, rel=0.02)
    (void,) = RunFolder(tmp_path / "run").events(events.RoundVoid)
    assert (void.round, void.reason) == (
        2, "3 of 6 groups tried the means on held-out records; it takes 4 to say which are good"
    )  # fmt: skip


def test_few_that_do_not_vote_change_nothing(tmp_path: Path, recipe: MakeRecipe) -> None:
    answers = honest(6)
    summary = federate(tmp_path / "run", recipe(), {**answers, "s00": refusing(answers["s00"], 2)})
    assert summary.void_rounds == 0
    assert [group["voted"] for group in tried(tmp_path / "run")[1].groups.values()].count(False) == 1


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it and tidy up."""


def test_a_server_that_is_killed_between_the_sums_and_the_vote_goes_on_as_if_it_had_not_been(
    tmp_path: Path, recipe: MakeRecipe
) -> None:
    answers = {**honest(9), "s03": Voter(-10.0)}
    whole = federate(tmp_path / "whole", recipe(groups=3), dict(answers))
    kills = [2]

    def killing(order: Envelope) -> Envelope:
        if order.kind == "vote" and order.fields["round"] in kills:
            kills.clear()
            raise Killed
        return answers["s05"](order)

    with pytest.raises(Killed):
        federate(tmp_path / "run", recipe(groups=3), {**answers, "s05": killing})
    assert RunStore(RunFolder(tmp_path / "run")).rounds() == [1]
    resumed = federate(tmp_path / "run", recipe(groups=3), {**answers, "s05": killing})
    assert (resumed.state_digest, resumed.void_rounds) == (whole.state_digest, 0)


WRONG_BALLOTS: dict[str, tuple[list[int], str]] = {
    "too few means": ([1, 0, 0], "it is no ballot on 3 states"),
    "negative weight": ([-1, 0, 0, 0, 0], "it is no ballot on 3 states"),
    "more than it holds out": ([10**9, 0, 0, 0, 0], "it announced 2 held-out records"),
    "a loss below any": ([1, 0, -(2**30), 0, 0], "is beyond what stage sft can give"),
    "a loss above any": ([1, 0, 2**40, 0, 0], "is beyond what stage sft can give"),
    "no number of its own": ([2**63, 0, 0, 0, 0], "ballot.0"),
}


@pytest.mark.parametrize("case", WRONG_BALLOTS)
def test_a_wrong_ballot_is_set_aside_with_name_and_reason_and_the_vote_goes_on(
    tmp_path: Path, recipe: MakeRecipe, case: str
) -> None:
    ballot, reason = WRONG_BALLOTS[case]
    answers = honest(9)

    def wrong(order: Envelope) -> Envelope:
        reply = answers["s05"](order)
        return Envelope.of(reply.kind, {**reply.fields, "ballot": ballot}) if order.kind == "vote" else reply

    federate(tmp_path / "run", recipe(groups=3, rounds=1), {**answers, "s05": wrong})
    (quarantined,) = RunFolder(tmp_path / "run").events(events.Quarantined)
    assert (quarantined.site, reason in quarantined.reason) == ("s05", True), quarantined.reason
    assert moved(tmp_path / "run") == pytest.approx(1, rel=0.02)


def test_a_group_from_which_nothing_came_is_left_out_and_the_others_go_on(tmp_path: Path, recipe: MakeRecipe) -> None:
    answers = honest(4)

    def away(order: Envelope) -> Envelope:
        return Refusal(reason="no memory").envelope() if order.kind == "train" else answers["s02"](order)

    federate(tmp_path / "run", recipe(rounds=1), {**answers, "s02": away})
    (left_out,) = RunFolder(tmp_path / "run").events(events.GroupLeftOut)
    assert (left_out.sites, left_out.rise, "0 updates came" in left_out.reason) == (["s02"], None, True)
    assert moved(tmp_path / "run") == pytest.approx(1, rel=0.02)


def test_two_groups_that_are_left_cannot_judge_each_other(tmp_path: Path, recipe: MakeRecipe) -> None:
    answers = honest(3)

    def away(order: Envelope) -> Envelope:
        return Refusal(reason="no memory").envelope() if order.kind == "train" else answers["s02"](order)

    with pytest.raises(RunError, match="3 attempts"):
        federate(tmp_path / "run", recipe(rounds=1), {**answers, "s02": away})
    (void, *_) = RunFolder(tmp_path / "run").events(events.AttemptVoid)
    assert "2 groups have a sum, and it takes 3" in void.reason


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"topology": {"kind": "gossip"}}, "aggregation.rule: 'group_gate' is a server's, .*; choose rule 'fedavg'"),
        (
            {"topology": {"judged_by": ["a"]}},
            "topology.judged_by: under .*: group_gate every site tries each group's mean",
        ),
        ({"topology": {"sites_per_round": 4, "asked_beyond": 0.5}}, "topology.asked_beyond: under .*; leave it out"),
        (
            {"topology": {"sites_per_round": 2}},
            "topology.sites_per_round: 2 is less than aggregation.group_gate.groups",
        ),
        ({"topology": {"sites": 2}}, "group_gate takes 3 groups here, so 3 sites at least, and there are 2; let more"),
        (
            {"topology": {"sites": 8}, "privacy": {"secure_aggregation": True}},
            "under masks of 3 sites each, .*: 9 sites at least, and there are 8; let more sites take part, choose a",
        ),
        ({"data": {"eval_fraction": 0.0}}, "aggregation.rule: group_gate: no records are held out to judge by"),
        (
            {"aggregation": {"scaffold": True}, "training": {"optim": "sgd"}},
            "aggregation.scaffold: it needs the mean of all sites",
        ),
        ({"groups": 2}, r"aggregation\.group_gate\.groups: input should be greater than or equal to 3"),
    ],
)
def test_what_does_not_go_with_it_is_refused_when_the_recipe_is_read(
    recipe: MakeRecipe, sections: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        recipe(**sections)
