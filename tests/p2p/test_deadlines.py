"""Deadlines: from what was observed, never past the recipe's bound, and growing for a slow site."""

from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.deadlines import Deadlines

seconds = st.floats(0, 1e4, allow_nan=False)


@given(st.lists(seconds, min_size=1, max_size=20), st.floats(1, 1e4), seconds)
def test_the_deadline_lies_past_the_median_and_within_the_bound(observed, bound, own):
    deadlines = Deadlines(bound)
    for one in observed:
        deadlines.observe(one)
    assert deadlines.typical == median(observed)
    assert deadlines.deadline(own) <= bound
    assert deadlines.deadline(own) >= min(bound, 1.5 * median(observed))


def test_the_deadline_is_median_plus_five_deviations():
    deadlines = Deadlines(3600)
    for one in (10.0, 20.0, 30.0, 40.0, 50.0):
        deadlines.observe(one)
    assert deadlines.deadline(0.0) == pytest.approx(30 + 5 * 10)


def test_before_anything_is_known_the_others_may_be_ten_times_slower():
    assert Deadlines(3600).deadline(20.0) == 260
    assert Deadlines(100).deadline(20.0) == 100


def test_late_arrivals_make_the_deadline_grow_until_the_slow_site_is_in_time():
    deadlines, slow = Deadlines(3600), 40.0
    for _ in range(20):
        deadlines.observe(10.0)
    rounds = 0
    while deadlines.deadline(10.0) < slow:
        deadlines.observe(10.0)
        deadlines.observe_late(slow)
        rounds += 1
        assert rounds < 20
