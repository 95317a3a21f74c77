"""The group gate's arithmetic: the draw of groups, the sum of ballots, and the choice against plain NumPy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_training.foundation.errors import ProtocolError
from core_training.foundation.trainable import EvalReport
from core_training.parts.aggregation_rules.group_gate import GroupGate
from core_training.recipe.schema import Recipe
from core_training.recipe.site_groups import bearable
from strategies.bounds import highest_loss
from strategies.codec_of_round import NO_VALUES, vote_codec
from strategies.group_gate import Ballot, drawn_groups, let_through, rises_of
from strategies.ring import RingSum

MakeRecipe = Callable[..., Recipe]
STEP = 2.0**-16


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> MakeRecipe:
    def make(groups: int | None = None, seed: int = 0, **sections: Any) -> Recipe:
        return make_recipe(
            topology={"kind": "federated", "rounds": 2, "local_steps": 1},
            aggregation={"rule": "group_gate", "group_gate": {"groups": groups}},
            training={"seed": seed},
            **sections,
        )

    return make


def names(count: int) -> list[str]:
    return [f"site{number}" for number in range(count)]


@pytest.mark.parametrize("sites", [3, 7, 8, 12, 100])
@pytest.mark.parametrize("groups", [None, 3, 5])
def test_groups_are_disjoint_and_cover_all_sites_and_are_of_one_size_or_one_apart(
    recipe: MakeRecipe, sites: int, groups: int | None
) -> None:
    wanted = recipe(groups)
    for number in range(1, 20):
        drawn = drawn_groups(wanted, number, names(sites))
        assert sorted(site for group in drawn for site in group) == sorted(names(sites))
        sizes = {len(group) for group in drawn}
        assert max(sizes) - min(sizes) <= 1
        assert len(drawn) == min(groups or 8, sites)


def test_groups_are_the_same_for_everybody_and_others_in_another_round_and_of_another_seed(recipe: MakeRecipe) -> None:
    drawn = drawn_groups(recipe(4), 5, names(12))
    assert drawn == drawn_groups(recipe(4), 5, names(12)[::-1])
    assert drawn != drawn_groups(recipe(4), 6, names(12))
    assert drawn != drawn_groups(recipe(4, seed=1), 5, names(12))


def test_over_many_rounds_every_two_sites_meet_alike(recipe: MakeRecipe) -> None:
    wanted = recipe(4)
    met = Counter(
        pair
        for number in range(1, 1101)
        for group in drawn_groups(wanted, number, names(12))
        for pair in combinations(group, 2)
    )
    assert set(met) == set(combinations(sorted(names(12)), 2))
    assert all(abs(times - 200) < 60 for times in met.values())  # 4 · 3 of 66 pairs a round


@pytest.mark.parametrize(
    ("sites", "masked", "groups"),
    [(3, False, 3), (8, False, 8), (50, False, 8), (9, True, 3), (12, True, 4), (50, True, 8)],
)
def test_unset_there_are_as_many_groups_of_the_least_size_as_the_sites_make(
    recipe: MakeRecipe, sites: int, masked: bool, groups: int
) -> None:
    privacy = {"secure_aggregation": {"minimum_sites": 2}} if masked else {}
    assert recipe(privacy=privacy).groups_among(sites) == groups


@pytest.mark.parametrize(
    ("groups", "privacy", "needed"),
    [
        (None, {}, 3),
        (5, {}, 5),
        (None, {"codec": "ring16"}, 3),
        (None, {"secure_aggregation": True}, 9),
        (4, {"secure_aggregation": True}, 12),
        (None, {"secure_aggregation": {"minimum_sites": 2}}, 9),
        (None, {"secure_aggregation": {"minimum_sites": 5}}, 15),
        (None, {"secure_aggregation": {"minimum_sites": 3, "threshold": 4}}, 12),
    ],
)
def test_as_many_sites_are_needed_as_the_groups_take(
    recipe: MakeRecipe, groups: int | None, privacy: dict[str, Any], needed: int
) -> None:
    wanted = recipe(groups, privacy=privacy)
    assert wanted.needed_sites == wanted.fewest_sites["aggregation.group_gate.groups"] == needed
    assert (wanted.too_few_for_groups(needed), bool(wanted.too_few_for_groups(needed - 1))) == ("", True)


def chosen(voices: np.ndarray[Any, Any], tolerance: float, most_rise: float) -> list[bool]:
    """By counting: a rise is a group's median over the voices, the middle one the smallest that half do not exceed."""
    count = voices.shape[1]
    ordered = np.sort(voices, axis=0)
    half = len(voices) // 2
    medians = ordered[half] if len(voices) % 2 else (ordered[half - 1] + ordered[half]) / 2
    middle = next(value for value in sorted(medians) if np.sum(medians <= value) * 2 >= count)
    return [bool(value - middle <= tolerance and value <= most_rise) for value in medians]


@given(st.integers(3, 9), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.02, 1.0]), st.sampled_from([0.0, 0.5]))
def test_the_choice_is_its_formula(groups: int, seed: int, tolerance: float, most_rise: float) -> None:
    random = np.random.default_rng(seed)
    weights = random.integers(1, 500, groups)
    start = random.integers(0, 10 * 2**16, groups) * weights
    losses = (
        start[:, None]
        + np.round(random.normal(scale=0.3, size=(groups, groups)) * 2**16).astype(int) * weights[:, None]
    )
    ballots = {
        group: Ballot(int(weights[group]), int(start[group]), tuple(map(int, losses[group]))) for group in range(groups)
    }
    voices = (losses - start[:, None]) / weights[:, None] * STEP
    own = let_through(rises_of(ballots, groups), GroupGate(tolerance=tolerance, most_rise=most_rise))
    assert own == chosen(voices, tolerance, most_rise)


@pytest.mark.parametrize("groups", range(3, 10))
def test_fewer_than_half_of_the_voices_decide_nothing(groups: int) -> None:
    """Whatever they say of any mean, what all the others agree on holds."""
    liars = bearable(groups)
    rises = [-0.1] * (groups - liars) + [3.0] * liars
    honest = Ballot(64, 64 * 4 * 2**16, tuple(round(64 * (4 + rise) * 2**16) for rise in rises))
    for lie in (-(2**46), 2**46):
        lies = Ballot(1, 0, tuple(lie if kept else -lie for kept in [True] * (groups - liars) + [False] * liars))
        ballots = {group: honest if group < groups - liars else lies for group in range(groups)}
        assert rises_of(ballots, groups) == pytest.approx(rises)
    assert let_through(rises, GroupGate()) == [True] * (groups - liars) + [False] * liars


def test_half_of_the_groups_may_be_bad_where_nobody_lies() -> None:
    assert let_through([3.0, -0.1, -0.09, 3.0], GroupGate()) == [False, True, True, False]


def test_groups_that_held_nothing_out_have_no_say_and_too_few_voices_are_no_vote() -> None:
    voice, mute = Ballot(10, 100, (90, 90, 90, 90)), Ballot(0, 0, (0, 0, 0, 0))
    assert rises_of({1: voice, 2: voice, 3: mute, 4: voice}, 4) == pytest.approx([-STEP] * 4)
    with pytest.raises(ProtocolError, match="2 of 4 groups tried the means on held-out records; it takes 3 to say"):
        rises_of({1: voice, 2: voice, 3: mute, 4: mute}, 4)
    with pytest.raises(ProtocolError, match=r"4 of 8 groups .* it takes 5"):
        rises_of(dict.fromkeys(range(4), Ballot(10, 0, (0,) * 8)), 8)


def test_all_groups_that_spoil_the_start_are_left_out() -> None:
    assert let_through([0.6, 0.7, 0.61], GroupGate()) == [False] * 3
    assert let_through([0.6, 0.7, 0.61], GroupGate(most_rise=1.0)) == [True, False, True]


def test_a_loss_that_is_no_number_is_the_worst_that_a_site_can_say(recipe: MakeRecipe) -> None:
    start = EvalReport(8.0, 2, 1)
    ballot = Ballot.of(recipe(), start, [None, EvalReport(1e30, 2, 1), EvalReport(6.0, 2, 1)])
    assert ballot.rises() == pytest.approx([highest_loss(recipe(), 2) / 2 - 4] * 2 + [-1.0])
    assert [report.loss for report in ballot.reports()] == pytest.approx(
        [4.0, *[highest_loss(recipe(), 2) / 2] * 2, 3.0]
    )


@pytest.mark.parametrize("codec", ["ring16", "ring24", "ring32"])
@pytest.mark.parametrize("sites", [1, 3, 13])
def test_a_sum_of_ballots_in_a_ring_is_their_sum(recipe: MakeRecipe, codec: str, sites: int) -> None:
    random = np.random.default_rng(sites)
    ballots = [
        Ballot(*map(int, random.integers(0, 2**20, 2)), tuple(map(int, random.integers(-(2**47), 2**47, 4))))
        for _ in range(sites)
    ]
    ring = vote_codec(recipe(privacy={"codec": codec}), 4, sites)
    total = RingSum(ring)
    for ballot in ballots:
        total.add(ring.encode(NO_VALUES, NO_VALUES, 1, ballot.to_integers(), b""))
    expected = ballots[0]
    for ballot in ballots[1:]:
        expected += ballot
    assert Ballot.from_integers(total.result(NO_VALUES).figures) == expected
    assert ring.payload_bytes < 512
