"""Ratings from wins: a closed form, a published table, and another way to the same top."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.pairs.bradley_terry import MIDDLE, POINTS, is_finite, log_strengths, ratings

AMERICAN_LEAGUE_1987 = [
    [0, 7, 9, 7, 7, 9, 11],
    [6, 0, 7, 5, 11, 9, 9],
    [4, 6, 0, 7, 7, 8, 12],
    [6, 8, 6, 0, 6, 7, 10],
    [6, 2, 6, 7, 0, 7, 12],
    [4, 4, 5, 6, 6, 0, 6],
    [2, 4, 1, 3, 1, 7, 0],
]
"""Wins of Milwaukee, Detroit, Toronto, New York, Boston, Cleveland, Baltimore (Agresti 1990, table 10.10)."""


def by_minorising(wins: np.ndarray, steps: int = 20000) -> np.ndarray:
    """The strengths by the fixed point of Zermelo and Hunter (2004)."""
    games, won, strength = wins + wins.T, wins.sum(axis=1), np.ones(len(wins))
    for _ in range(steps):
        before = strength
        strength = won / (games / (strength[:, None] + strength[None, :])).sum(axis=1)
        strength = strength / strength.sum()
        if np.abs(np.log(strength / before)).max() < 1e-12:
            break
    theta = np.log(strength)
    return theta - theta.mean()


@pytest.mark.parametrize(("won", "lost"), [(3, 1), (10, 9.5), (0.5, 40)])
def test_two_models_are_as_far_apart_as_the_logarithm_of_their_odds(won, lost):
    strengths = log_strengths(np.array([[0, won], [lost, 0]]))
    assert strengths[0] - strengths[1] == pytest.approx(math.log(won / lost), abs=1e-9)


def test_strengths_are_those_of_a_published_table():
    strengths = log_strengths(np.array(AMERICAN_LEAGUE_1987))
    published = [1.581, 1.436, 1.294, 1.248, 1.108, 0.684, 0.0]
    assert (strengths - strengths[-1]).tolist() == pytest.approx(published, abs=6e-4)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
def test_newton_comes_where_the_fixed_point_of_minorisation_comes(seed, models):
    random = np.random.default_rng(seed)
    wins = random.integers(0, 12, size=(models, models)) / 2 * (1 - np.eye(models))
    wins[np.arange(models), (np.arange(models) + 1) % models] += 1  # a circle, so that all are finite
    assert log_strengths(wins) == pytest.approx(by_minorising(wins), abs=1e-6)


def test_lopsided_wins_converge():
    wins = np.array([[0, 5000, 1], [0.5, 0, 3], [4000, 1, 0]])
    assert log_strengths(wins) == pytest.approx(by_minorising(wins), abs=1e-5)


def test_several_sets_at_once_are_each_by_themselves():
    sets = np.stack([np.array(AMERICAN_LEAGUE_1987)[:3, :3], [[0, 1, 2], [3, 0, 4], [5, 6, 0]]])
    assert log_strengths(sets)[1] == pytest.approx(log_strengths(sets[1]))


def test_who_wins_all_is_rated_with_half_a_win_against():
    wins = np.array([[0.0, 12.0], [0.0, 0.0]])
    assert not is_finite(wins[None])[0]
    strengths = log_strengths(wins)
    assert strengths[0] - strengths[1] == pytest.approx(math.log(12.5 / 0.5))
    found = ratings(np.repeat(wins[None] / 12, 12, axis=0))
    assert found.is_bounded
    error = math.sqrt(1 / 12.5 + 1 / 0.5) / 2 * 1.96 * POINTS  # the closed form for half a difference of log odds
    one = found.intervals[0]
    assert (one.value - one.low, one.high - one.value) == pytest.approx((error, error))


def test_models_that_never_met_are_rated_all_the_same():
    wins = np.zeros((4, 4))
    wins[0, 1] = wins[1, 0] = wins[2, 3] = wins[3, 2] = 2
    assert log_strengths(wins) == pytest.approx(np.zeros(4), abs=1e-9)


def test_ratings_have_the_mean_and_the_unit_that_are_said():
    wins = np.array([[[0, 1.0], [0, 0]]] * 10 + [[[0, 0], [1.0, 0]]])
    first, second = ratings(wins).intervals
    assert first.value + second.value == pytest.approx(2 * MIDDLE)
    assert first.value - second.value == pytest.approx(400)  # odds of ten to one
    assert first.low < first.value < first.high


def test_intervals_cover_the_true_ratings():
    random = np.random.default_rng(3)
    truth = np.array([0.6, 0.0, -0.6])
    chance = 1 / (1 + np.exp(truth[None, :] - truth[:, None]))
    covered, trials = 0, 100
    for _ in range(trials):
        wins = np.triu(random.random((60, 3, 3)) < chance, 1).astype(float)
        wins += np.tril(1 - wins.transpose(0, 2, 1), -1)
        one = ratings(wins, resamples=200).intervals[0]
        covered += one.low <= MIDDLE + POINTS * truth[0] <= one.high
    assert 0.90 <= covered / trials <= 0.99
