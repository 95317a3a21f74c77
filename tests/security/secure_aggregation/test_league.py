"""The sites that a lying server needs in league to read one's update: what the documentation says is what it takes."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_training.foundation.errors import ProtocolError
from security.secure_aggregation.graph import MOST_NEIGHBOURS
from security.secure_aggregation.server import ServerRound
from security.secure_aggregation.terms import Minimums, Terms
from tests.security.secure_aggregation.federation import Federation

DOCUMENTATION = Path(__file__).parents[3] / "docs" / "security.md"
MOST = MOST_NEIGHBOURS + 1


def found_by_search(holders: int, threshold: int, minimum: int) -> int:
    """The fewest in league with whom some plan of the server's gives it one victim's update.

    Those in league answer whatever they are asked, an honest site one list of survivors, and the victim none that says
    it dropped out. The plans: one list in which all but the victim are in league; or two, with the victim and without.
    """
    for league in range(holders):
        honest = holders - 1 - league
        if league + 1 >= max(threshold, minimum):
            return league
        for told_that_it_dropped, told_that_it_survived in product(range(honest + 1), repeat=2):
            if told_that_it_dropped + told_that_it_survived > honest:
                continue
            # The lists leave the minimum among the survivors; the victim answers the list that it survives in.
            enough = league + told_that_it_dropped >= max(threshold, minimum)
            if enough and league + told_that_it_survived + 1 >= max(threshold, minimum):
                return league
    raise AssertionError("all others in league are enough")


@pytest.mark.parametrize("minimum", [2, 3, 5, 10, 16])
def test_the_numbers_in_league_are_those_that_a_search_over_all_lists_finds(minimum: int) -> None:
    for holders in range(max(minimum, 3), MOST + 1):
        terms = Terms(None, minimum, 16, 1.0)
        assert terms.league_of(holders) == found_by_search(holders, terms.threshold_of(holders), minimum)
        assert terms.league_of(holders) >= minimum - 1


thresholds = st.none() | st.integers(2, MOST) | st.floats(0.5, 1, exclude_min=True, exclude_max=True)


@given(thresholds, st.integers(2, MOST), st.data())
def test_no_threshold_of_a_recipe_lets_fewer_in_league_read_an_update_than_a_site_demands(
    threshold: float | None, minimum: int, data: st.DataObject
) -> None:
    terms = Terms(threshold, data.draw(st.integers(minimum, MOST)), 16, 1.0)
    holders = data.draw(st.integers(terms.minimum_sites, MOST))
    try:
        agreed = Minimums(minimum_sites=minimum).check_threshold(terms, holders)
    except ProtocolError:
        assert threshold is not None, "the usual threshold keeps what every minimum promises"
        return
    assert 2 * agreed - holders >= minimum - 1


@pytest.mark.parametrize("holders", range(3, MOST + 1))
def test_one_site_in_league_is_never_enough_for_a_site_that_demands_what_is_usual(holders: int) -> None:
    barely = Terms(holders // 2 + 1, 3, 16, 1.0)
    if 2 * (holders // 2 + 1) - holders >= 2:
        assert Minimums().check_threshold(barely, holders) == holders // 2 + 1
    else:
        with pytest.raises(ProtocolError, match=rf"would need 1 in league .* so a threshold of {(holders + 3) // 2}:"):
            Minimums().check_threshold(barely, holders)


def test_a_site_of_a_large_cohort_holds_the_threshold_against_its_neighbourhood() -> None:
    federation = Federation(60, Terms(26, 3, 16, 1.0), Minimums())
    with pytest.raises(ProtocolError, match="threshold 26 of 51 sites: the server would need 1 in league"):
        federation.set_up()


@pytest.mark.parametrize("short", [1, 0])
@pytest.mark.parametrize(("count", "minimum"), [(4, 3), (5, 3), (7, 3), (7, 5)])
def test_with_one_fewer_in_league_two_lists_of_survivors_open_no_update_and_with_all_they_do(
    count: int, minimum: int, short: int
) -> None:
    terms = Terms(None, minimum, 16, 1.0)
    federation = Federation(count, terms, Minimums(minimum_sites=minimum))
    federation.set_up()
    vectors = federation.vectors()
    victim, *others = federation.names
    league = others[: terms.league_of(count) - short]
    # Of the honest ones as many are told the truth as that list lacks; to the others the victim has dropped out.
    honest = others[len(league) :]
    believing = honest[: max(terms.threshold_of(count) - 1 - len(league), 0)]
    true_list, false_list = federation.begin(), federation.begin()
    for name in federation.names:
        masked = federation.mask(true_list, name, vectors[name])
        true_list.add(name, *masked)
        if name != victim:
            false_list.add(name, *masked)
    before = {name: json.loads(json.dumps(federation.sites[name].record)) for name in league}
    answer(federation, true_list, [victim, *believing, *league])
    for name in league:
        federation.sites[name] = federation.new_site(name, before[name])  # who cheats forgets what it has answered
    answer(federation, false_list, [name for name in others if name not in believing])
    sums = [opened.finish() for opened in (true_list, false_list) if len(opened._replies) >= terms.threshold_of(count)]
    assert len(sums) == (1 if short else 2)
    if not short:
        np.testing.assert_array_equal(sums[0] - sums[1], vectors[victim])


def answer(federation: Federation, opened: ServerRound, names: list[str]) -> None:
    orders = opened.unmask_orders()
    for name in names:
        opened.add_unmasked(name, federation.answer(name, "unmask", orders[name]))


def rows(header: str) -> list[list[str]]:
    """The rows of the documentation's table with this header; numbers alone, without what is said of them."""
    lines = DOCUMENTATION.read_text(encoding="utf-8").splitlines()
    first = next(place for place, line in enumerate(lines) if line.startswith(header))
    table = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        table.append([re.sub(r" \(.*\)$", "", cell.strip()) for cell in line.strip("|").split("|")])
    return [table[0], *table[2:]]


def test_the_tables_of_the_documentation_are_those_of_the_code() -> None:
    for minimum, holders, threshold, missing, league in rows("| `minimum_sites` | *n* |")[1:]:
        terms = Terms(None, int(minimum), 16, 1.0)
        assert terms.threshold_of(int(holders)) == int(threshold) == int(holders) - int(missing)
        assert terms.league_of(int(holders)) == int(league)
    demanded, promised = rows("| `minimum_sites` in the site's")
    for minimum, league in zip(map(int, demanded[1:]), promised[1:], strict=True):
        demands = Minimums(minimum_sites=minimum)
        lowest = [lowest_threshold(demands, holders) for holders in range(max(minimum, 3), MOST + 1)]
        found = [
            found_by_search(holders, threshold, minimum) for holders, threshold in enumerate(lowest, max(minimum, 3))
        ]
        assert min(found) == int(league)


def lowest_threshold(demands: Minimums, holders: int) -> int:
    """The lowest threshold with which a site that demands this takes part."""
    for threshold in range(1, holders + 1):
        with suppress(ProtocolError):
            return demands.check_threshold(Terms(threshold, demands.minimum_sites, 16, 1.0), holders)
    raise AssertionError("a site takes part where all are needed")
