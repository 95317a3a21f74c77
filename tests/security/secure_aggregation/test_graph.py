"""Who masks with whom: alike at every site, connected, and nobody's choice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_training.foundation.errors import ProtocolError
from security.secure_aggregation.graph import MOST_NEIGHBOURS, Graph, from_bits, roster_digest, to_bits

ROSTER = {f"site-{number:04d}": f"key of {number}" for number in range(1000)}


def test_up_to_51_sites_everybody_masks_with_everybody():
    cohort = sorted(ROSTER)[:51]
    assert all(Graph(cohort, ROSTER).holders(site) == cohort for site in cohort)


@pytest.mark.parametrize("size", [52, 53, 1000])
def test_above_51_everybody_has_fifty_neighbours_who_have_it_too(size):
    cohort = sorted(ROSTER)[:size]
    graph = Graph(cohort, ROSTER)
    for site in cohort:
        holders = graph.holders(site)
        assert site in holders
        assert holders == sorted(set(holders))
        assert len(holders) == MOST_NEIGHBOURS + 1
        assert all(site in graph.holders(holder) for holder in holders)


def test_the_graph_stays_connected_when_a_third_of_the_sites_is_gone():
    graph = Graph(ROSTER, ROSTER)
    there = set(list(ROSTER)[::3]) | set(list(ROSTER)[1::3])
    reached, border = set(), [min(there)]
    while border:
        site = border.pop()
        reached.add(site)
        border += (there - reached) & set(graph.holders(site))
    assert reached == there


def test_neighbours_are_not_those_of_the_alphabet_and_change_with_the_roster_alone():
    cohort = sorted(ROSTER)[:100]
    holders = Graph(cohort, ROSTER).holders(cohort[50])
    assert holders != cohort[25:76]
    assert Graph(cohort[::-1], dict(reversed(ROSTER.items()))).holders(cohort[50]) == holders
    assert Graph(cohort, {**ROSTER, "site-0999": "another key"}).holders(cohort[50]) != holders


@given(st.sets(st.sampled_from(sorted(ROSTER)[:19])))
def test_a_set_of_sites_survives_the_trip_as_bits(sites):
    roster = {name: ROSTER[name] for name in sorted(ROSTER)[:19]}
    bits = to_bits(sites, roster)
    assert len(bits) == 3
    assert from_bits(bits, roster) == sorted(sites)


@pytest.mark.parametrize("bits", [b"", b"\0\0", b"\0\0\0\0", b"\0\0\x08", b"\xff\xff\xff"])
def test_bits_of_another_roster_are_refused(bits):
    with pytest.raises(ProtocolError, match="one bit for each of the roster's 19 names"):
        from_bits(bits, {name: ROSTER[name] for name in sorted(ROSTER)[:19]})


def test_rosters_with_another_name_or_key_have_another_digest():
    digests = {roster_digest(roster) for roster in ({"a": "1"}, {"a": "2"}, {"b": "1"}, {"a": "1", "b": "1"})}
    assert len(digests) == 4
