"""Intervals cover what they say, and tests of differences give published and hand-made numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from evaluation.figures.statistics import Sums, difference, holm, interval, mcnemar, mean, ratio, student_t


@pytest.mark.parametrize(
    ("probability", "degrees", "quantile"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.3027), (0.975, 9, 2.2622), (0.95, 30, 1.6973), (0.975, 120, 1.9799)],
)
def test_quantiles_of_students_t_are_those_of_the_printed_tables(probability, degrees, quantile):
    assert student_t(probability, degrees) == pytest.approx(quantile, abs=6e-5)


def test_quantiles_for_many_degrees_join_those_of_the_normal_distribution():
    assert student_t(0.975, 10**6) == pytest.approx(1.959966, abs=1e-5)
    assert student_t(0.975, 1001) == pytest.approx(student_t(0.975, 1000), abs=1e-5)


@pytest.mark.parametrize(("n", "share"), [(40, 0.6), (120, 0.85), (200, 0.3)])
def test_an_interval_of_a_share_covers_the_truth_in_95_of_100_evaluations(n, share):
    random = np.random.default_rng(1)
    covered = []
    for _ in range(800):
        found = interval(mean((random.random(n) < share).astype(float), is_share=True), resamples=600)
        covered.append(found.low <= share <= found.high)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def test_an_interval_of_a_loss_per_token_covers_the_truth_in_95_of_100_evaluations():
    random = np.random.default_rng(2)
    covered = []
    for _ in range(800):
        tokens = random.integers(5, 40, size=60)
        sums = tokens * 2.0 + random.normal(size=60) * np.sqrt(tokens)  # two nats a token
        found = interval(ratio(sums, tokens), resamples=600)
        covered.append(found.low <= 2.0 <= found.high)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def test_where_all_are_right_the_interval_is_clopper_and_pearsons():
    found = interval(mean([1.0] * 20, is_share=True))
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.8316, abs=1e-4)  # the table's for 20 of 20


def test_one_item_has_no_interval_and_none_no_value():
    assert math.isnan(interval(mean([1.0])).low)
    assert math.isnan(interval(mean([])).value)


@pytest.mark.parametrize(("only_ours", "only_theirs", "p"), [(0, 0, 1.0), (1, 9, 0.021484375), (121, 59, 4.434e-06)])
def test_mcnemar_is_twice_the_binomials_tail(only_ours, only_theirs, p):
    ours = [True] * only_ours + [False] * only_theirs + [True, False]
    theirs = [False] * only_ours + [True] * only_theirs + [True, False]
    assert mcnemar(ours, theirs) == pytest.approx(p, rel=2e-4)  # statsmodels 0.14 prints four digits


def test_mcnemar_equals_the_count_of_all_tosses():
    ours, theirs = [True] * 5 + [False] * 2, [False] * 5 + [True] * 2
    as_far = sum(abs(2 * sum(toss) - 7) >= 3 for toss in itertools.product([0, 1], repeat=7))
    assert mcnemar(ours, theirs) == as_far / 2**7


def test_holm_adjusts_as_in_the_worked_example():
    # 0.01, 0.04, 0.03 and 0.005 of four tests: 0.03, 0.06, 0.06 and 0.02.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_a_paired_difference_is_narrower_than_two_intervals_apart():
    random = np.random.default_rng(3)
    hard = random.normal(size=200)
    ours, theirs = mean(hard), mean(hard + 0.1 + 0.01 * random.normal(size=200))
    found = difference(theirs, ours)
    assert found.method == "paired bootstrap"
    assert 0.095 < found.low < found.value < found.high < 0.105
    assert found.p < 0.001


def test_a_p_of_the_paired_bootstrap_is_uniform_where_nothing_differs():
    random = np.random.default_rng(4)
    ps = []
    for _ in range(400):
        common = random.normal(size=50)
        ours, theirs = (mean(common + random.normal(size=50)) for _ in range(2))
        ps.append(difference(ours, theirs, resamples=400).p)
    assert np.mean(np.array(ps) < 0.05) == pytest.approx(0.05, abs=0.03)


def test_a_difference_of_nothing_has_p_one():
    assert difference(mean([0.1, 0.2, 0.3]), mean([0.1, 0.2, 0.3])).p == 1.0


def test_the_same_items_are_drawn_whatever_the_figure():
    values = np.array([0.1, 0.5, 0.9, 0.4])
    alone = interval(mean(values))
    whole = interval(Sums(np.stack([values, np.ones(4), values**2], axis=1), lambda s: s[..., 0] / s[..., 1]))
    assert (alone.low, alone.high) == (whole.low, whole.high)
