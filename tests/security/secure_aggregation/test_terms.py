"""The threshold is always a majority; a site's own minimums bind every run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_training.foundation.errors import InputError, ProtocolError
from security.secure_aggregation.terms import Minimums, Terms


@given(st.integers(1, 200))
def test_unless_said_the_threshold_is_the_least_number_above_two_thirds(holders):
    threshold = Terms(None, 3, 16, 1.0).threshold_of(holders)
    assert 3 * threshold > 2 * holders >= 3 * (threshold - 1)


@given(st.integers(1, 200), st.floats(0.5, 1, exclude_max=True))
def test_a_share_is_exceeded_and_never_more_than_all(holders, share):
    threshold = Terms(share, 3, 16, 1.0).threshold_of(holders)
    assert share * holders < threshold <= holders


@pytest.mark.parametrize(("threshold", "holders"), [(2, 4), (5, 10), (1, 2), (6, 5), (0, 1), (0.3, 10)])
def test_half_or_less_and_more_than_all_are_refused(threshold, holders):
    with pytest.raises(ProtocolError, match="must be more than half"):
        Terms(threshold, 3, 16, 1.0).threshold_of(holders)


def test_a_number_is_taken_as_it_is():
    assert Terms(7, 3, 16, 1.0).threshold_of(10) == 7


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (Terms(0.55, 5, 24, 1.0), "threshold 0.55: this site takes part from 0.6 up"),
        (Terms(None, 4, 24, 1.0), "minimum_sites 4: this site takes part from 5 up"),
        (Terms(None, 5, 16, 1.0), "ring_bits 16: this site takes part from 24 up"),
        (Terms(None, 5, 24, 0.01), "clip 0.01: this site takes part from 0.1 up"),
        (Terms(None, 5, 24, 3.0), "clip 3: this site takes part up to 2"),
    ],
)
def test_terms_below_a_sites_minimums_are_refused_with_both_values(terms, message):
    with pytest.raises(InputError, match=message):
        Minimums(0.6, 5, 24, 0.1, 2.0).check(terms)


def test_terms_at_the_minimums_are_taken():
    minimums = Minimums(0.6, 5, 24, 0.1, 2.0)
    for terms in (Terms(0.6, 5, 24, 0.1), Terms(None, 6, 32, 2.0), Terms(4, 5, 24, 1.0)):
        minimums.check(terms)


def test_a_threshold_in_sites_is_held_against_the_cohort():
    minimums = Minimums(threshold=0.6)
    assert minimums.check_threshold(Terms(7, 3, 16, 1.0), 11) == 7
    for threshold, holders in ((7, 12), (6, 10)):  # less than 0.6 of them, and no more
        says = rf"threshold {threshold} of {holders} sites: this site wants more than 0\.6 of them"
        with pytest.raises(ProtocolError, match=says):
            minimums.check_threshold(Terms(threshold, 3, 16, 1.0), holders)


def test_different_terms_have_different_digests():
    several = [Terms(None, 3, 16, 1.0), Terms(2, 3, 16, 1.0), Terms(None, 2, 16, 1.0), Terms(None, 3, 24, 1.0)]
    assert len({terms.digest() for terms in [*several, Terms(None, 3, 16, 2.0)]}) == 5
