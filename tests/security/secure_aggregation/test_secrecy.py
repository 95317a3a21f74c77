"""What the server sees says nothing about one site's vector beyond the sum of the survivors."""

import json

import numpy as np
import pytest

from core_training.foundation.errors import ProtocolError
from security.secure_aggregation.keys import SlotSecrets, commitment, open_reply, own_mask
from security.secure_aggregation.masks import add_masks
from security.secure_aggregation.messages import Unmasked
from security.secure_aggregation.shamir import join
from security.secure_aggregation.terms import Terms
from tests.security.secure_aggregation.federation import CONTEXT, Federation

LENGTH = 200_000


def chi_square(table: np.ndarray) -> float:
    """Pearson's statistic of a table of counts against the product of its margins, or of a row against evenness."""
    table = np.atleast_2d(table).astype(float)
    columns = table.sum(0) if len(table) > 1 else np.full(table.shape[1], table.mean())
    wanted = np.outer(table.sum(1), columns) / columns.sum()
    return float(((table - wanted) ** 2 / wanted).sum())


def assert_plausible(statistic: float, freedom: int) -> None:
    """Within six standard deviations of a chi-square variable's mean."""
    assert abs(statistic - freedom) < 6 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("ring_bits", [16, 24, 32])
@pytest.mark.parametrize("value", ["zero", "largest", "varied"])
@pytest.mark.parametrize("own_masks_are_known", [False, True])
def test_a_masked_vector_is_uniform_and_independent_of_the_input(ring_bits, value, own_masks_are_known):
    federation = Federation(3, Terms(None, 3, ring_bits, 1.0))
    federation.set_up()
    opened = federation.begin(length=LENGTH)
    dtype = np.uint16 if ring_bits == 16 else np.uint32
    plain = np.zeros(LENGTH, dtype)
    if value == "largest":
        plain += dtype((1 << ring_bits) - 1)
    elif value == "varied":
        plain += (np.random.default_rng(1).normal(0, 4, LENGTH).round().astype(np.int64) & 0xFFF).astype(dtype)
    site = federation.names[1]
    secret = SlotSecrets(federation.sites[site]._record.seeds[0]).own_mask
    _, masked = federation.mask(opened, site, plain)
    assert masked.max() < 1 << ring_bits
    if own_masks_are_known:  # as to the server in the end: the pairwise masks remain
        key = own_mask(secret, federation.batch.batch.place(0), site, 1, CONTEXT)
        add_masks(masked, (), [key])
        masked &= dtype((1 << ring_bits) - 1)
    for shift in range(0, ring_bits, 8):
        assert_plausible(chi_square(np.bincount(masked >> shift & 0xFF, minlength=256)), 255)
    if value == "varied":
        for shift in range(0, ring_bits, 4):
            pairs = (plain & 15).astype(np.int64) * 16 + (masked >> shift & 15)
            assert_plausible(chi_square(np.bincount(pairs, minlength=256).reshape(16, 16)), 225)


def test_the_view_of_the_server_for_two_inputs_differs_in_the_masked_vector_alone():
    views = []
    for change in (0, 12345):
        federation = Federation(4)
        federation.set_up()
        vectors = federation.vectors()
        vectors["site-02"] += np.uint16(change)
        _, total = federation.run_round(vectors, no_unmask=["site-00"])
        views.append((federation.view, total))
    (first, first_sum), (second, second_sum) = views
    assert len(first) == len(second) == 4 + 4 + 2 * 4 + 3
    different = [place for place, (one, other) in enumerate(zip(first, second, strict=True)) if one != other]
    statement, vector = 4 + 4 + 2 * 2, 4 + 4 + 2 * 2 + 1
    assert different == [statement, vector]
    ours, theirs = json.loads(first[statement])["document"], json.loads(second[statement])["document"]
    assert [field for field in ours if ours[field] != theirs[field]] == ["vector"]
    vectors = [np.frombuffer(view[vector], np.uint16) for view in (first, second)]
    assert {int(value) for value in vectors[1] - vectors[0]} == {12345}
    assert {int(value) for value in second_sum - first_sum} == {12345}


def test_the_view_for_two_inputs_with_one_sum_has_the_same_form_and_shares_no_mask():
    """The others' randomness is fixed; one site draws anew, and gives another vector that makes the same sum."""
    views = []
    for seed, change in ((0, 0), (7, 999)):
        federation = Federation(4, other_seeds={"site-02": seed})
        federation.set_up()
        vectors = federation.vectors()
        vectors["site-02"] += np.uint16(change)
        vectors["site-01"] -= np.uint16(change)
        _, total = federation.run_round(vectors)
        views.append((federation.view, total.tolist(), vectors))
    (first, first_sum, _), (second, second_sum, vectors) = views
    assert first_sum == second_sum
    assert [len(message) for message in first] == [len(message) for message in second]
    assert [place for place in range(4) if first[place] != second[place]] == [2]  # the others' keys are what they were
    masked = {bytes(message) for view in (first, second) for message in view if len(message) == 16}
    assert len(masked) == 8  # nobody's vector stood under the same mask twice
    assert not masked & {vector.tobytes() for vector in vectors.values()}


def split(count: int, terms: Terms, first: int):
    """A server that tells the first sites that all survived, and the others that the last site dropped out."""
    federation = Federation(count, terms)
    federation.set_up()
    vectors = federation.vectors()
    rounds = [federation.begin(), federation.begin()]
    for name in federation.names:
        masked = federation.mask(rounds[0], name, vectors[name])
        rounds[0].add(name, *masked)
        if name != federation.names[-1]:
            rounds[1].add(name, *masked)
    orders = [opened.unmask_orders() for opened in rounds]
    for place, name in enumerate(federation.names[:-1]):
        told = 0 if place < first else 1
        answer = federation.answer(name, "unmask", orders[told][name])
        with pytest.raises(ProtocolError, match="'survivors' is not what it must be"):
            rounds[1 - told].add_unmasked(name, answer)
        rounds[told].add_unmasked(name, answer)
        with pytest.raises(ProtocolError, match="other survivors"):
            federation.answer(name, "unmask", orders[1 - told][name])
    return federation, vectors, rounds


@pytest.mark.parametrize("first", range(7))
def test_a_split_list_of_survivors_opens_one_sum_at_most(first):
    federation, vectors, rounds = split(7, Terms(4, 3, 16, 1.0), first)
    results = []
    for opened, replies in zip(rounds, (first, 6 - first), strict=True):
        if replies >= 4:
            np.testing.assert_array_equal(opened.finish(), federation.plain_sum(vectors, opened.survivors))
            results.append(opened)
        else:
            with pytest.raises(ProtocolError, match="it takes 4"):
                opened.finish()
    assert len(results) <= 1


def test_replies_to_a_split_list_stay_sealed_although_together_they_are_enough():
    federation, _, rounds = split(7, Terms(4, 3, 16, 1.0), 3)
    replies: dict[str, Unmasked] = {**rounds[0]._replies, **rounds[1]._replies}
    assert len(replies) == 6
    for place, holder in enumerate(federation.names[:-1]):
        pads = {1 + other: int.from_bytes(replies[federation.names[other]].pads[place]) for other in range(1, 5)}
        with pytest.raises(ProtocolError, match="do not open it"):
            open_reply(join(pads), replies[holder].sealed)


def test_a_reply_holds_one_share_of_every_site_and_of_the_right_secret():
    federation = Federation(5, Terms(3, 3, 16, 1.0))
    federation.set_up()
    vectors = federation.vectors()
    opened, _ = federation.run_round(vectors, no_vector=federation.names[3:])
    for number, holder in enumerate(opened.survivors):
        pads = {
            1 + place: int.from_bytes(opened._replies[name].pads[number]) for place, name in enumerate(opened.survivors)
        }
        given = open_reply(join(pads), opened._replies[holder].sealed)
        assert len(given) == 33 * 5
        for place, dealer in enumerate(federation.names):
            commitments = federation.batch.deals[dealer].slots[0].commitments[number]
            share = commitment(given[33 * place : 33 * (place + 1)])
            assert share == (commitments[:32] if dealer in federation.names[3:] else commitments[32:])


def test_no_two_slots_or_sites_have_a_mask_in_common():
    federation = Federation(4)
    seen = set()
    for batch in range(2):
        federation.set_up(slots=3, number=batch)
        for slot in range(3):
            opened = federation.begin(slot, round=3 * batch + slot)
            for name in federation.names:
                _, masked = federation.mask(opened, name, np.zeros(8, np.uint16), round=3 * batch + slot)
                seen.add(masked.tobytes())
    assert len(seen) == 2 * 3 * 4
