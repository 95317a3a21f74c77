"""Deadlines: from what was observed, never past the recipe's bound, and growing for a slow site."""

from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.pace import Pace

seconds = st.floats(0, 1e4, allow_nan=False)


@given(st.lists(seconds, min_size=1, max_size=20), st.floats(1, 1e4), seconds)
def test_the_deadline_lies_past_the_median_and_within_the_bound(observed, bound, own):
    pace = Pace(bound)
    for one in observed:
        pace.observe(one)
    assert pace.typical == median(observed)
    assert pace.deadline(own) <= bound
    assert pace.deadline(own) >= min(bound, 1.5 * median(observed))


def test_the_deadline_is_median_plus_five_deviations():
    pace = Pace(3600)
    for one in (10.0, 20.0, 30.0, 40.0, 50.0):
        pace.observe(one)
    assert pace.deadline(0.0) == pytest.approx(30 + 5 * 10)


def test_before_anything_is_known_the_others_may_be_ten_times_slower():
    assert Pace(3600).deadline(20.0) == 260
    assert Pace(100).deadline(20.0) == 100


def test_late_arrivals_make_the_deadline_grow_until_the_slow_site_is_in_time():
    pace, slow = Pace(3600), 40.0
    for _ in range(20):
        pace.observe(10.0)
    epochs = 0
    while pace.deadline(10.0) < slow:
        pace.observe(10.0)
        pace.observe_late(slow)
        epochs += 1
        assert epochs < 20
