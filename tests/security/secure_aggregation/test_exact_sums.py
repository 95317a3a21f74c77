"""The masked sum is the plain sum of the survivors, bit for bit, whoever drops out at whatever step."""

import numpy as np
import pytest

from core_training.foundation.errors import ProtocolError
from security.secure_aggregation.server import ServerBatch, ServerRound
from security.secure_aggregation.terms import Terms
from tests.security.secure_aggregation.federation import CONTEXT, RUN, Federation

# By number of sites: the terms, and how many may be missing at each step.
COHORTS = {
    3: (Terms(2, 2, 16, 1.0), 1),
    5: (Terms(None, 3, 24, 1.0), 1),
    16: (Terms(None, 3, 16, 1.0), 5),
    50: (Terms(None, 3, 32, 1.0), 16),
}


@pytest.fixture(scope="module", params=COHORTS)
def federation(request):
    made = Federation(request.param, COHORTS[request.param][0])
    made.set_up(slots=len(STEPS))
    return made


STEPS = ["nobody", "before masking", "after masking", "before and after masking"]


@pytest.mark.parametrize("step", STEPS)
def test_masked_sum_is_the_plain_sum_of_the_survivors_when_sites_drop_out(federation, step):
    slot, missing = STEPS.index(step), COHORTS[len(federation.names)][1]
    no_vector, no_unmask = {
        "nobody": (0, 0),
        "before masking": (missing, 0),
        "after masking": (0, missing),
        "before and after masking": (missing // 2, missing - missing // 2),
    }[step]
    gone, silent = federation.names[::-1][:no_vector], federation.names[1 : 1 + no_unmask]
    vectors = federation.vectors(seed=slot)
    opened, got = federation.run_round(vectors, slot, slot + 1, gone, silent)
    assert opened.survivors == [name for name in federation.names if name not in gone]
    np.testing.assert_array_equal(got, federation.plain_sum(vectors, opened.survivors))


@pytest.mark.parametrize("count", [5, 16])
def test_sites_missing_in_the_set_up_leave_the_sum_of_the_others(count):
    federation = Federation(count, Terms(3 if count == 5 else None, 3, 16, 1.0))
    before_keys, after_keys = federation.names[0], federation.names[2]
    federation.set_up(no_keys=[before_keys], no_shares=[after_keys])
    vectors = federation.vectors()
    opened, got = federation.run_round(vectors)
    assert opened.participants == [name for name in federation.names if name not in (before_keys, after_keys)]
    np.testing.assert_array_equal(got, federation.plain_sum(vectors, opened.participants))


def test_on_a_graph_of_fifty_neighbours_drop_outs_at_both_steps_leave_an_exact_sum():
    federation = Federation(64)
    federation.set_up()
    vectors = federation.vectors()
    gone, silent = federation.names[::9], federation.names[1::9]
    opened, got = federation.run_round(vectors, no_vector=gone, no_unmask=silent)
    assert len(opened.survivors) == 64 - len(gone)
    np.testing.assert_array_equal(got, federation.plain_sum(vectors, opened.survivors))


def test_weights_are_inside_the_sum():
    federation = Federation(5)
    federation.set_up()
    _, got = federation.run_round(vectors := federation.vectors())
    weights = [int(vector[-1]) for vector in vectors.values()]
    assert all(1 <= weight < 50 for weight in weights)
    assert got[-1] == sum(weights)


def test_every_slot_of_a_batch_and_a_second_batch_serve_a_round():
    federation = Federation(4)
    for batch in range(2):
        federation.set_up(slots=3, number=batch)
        for slot in range(3):
            vectors = federation.vectors(seed=slot)
            _, got = federation.run_round(vectors, slot, 3 * batch + slot)
            np.testing.assert_array_equal(got, federation.plain_sum(vectors, federation.names))


def test_a_site_that_dealt_late_takes_part_from_the_next_round_on():
    federation = Federation(4, Terms(3, 3, 16, 1.0))
    batch = ServerBatch(RUN, 0, 2, federation.roster, federation.terms)
    for name in federation.names:
        batch.add_keys(name, federation.answer(name, "keys", batch.keys_order()))
    *early, late = [(name, federation.answer(name, "shares", order)) for name, order in batch.shares_orders().items()]
    for name, answer in early:
        batch.add_shares(name, answer)
    federation.batch = batch
    vectors = federation.vectors()
    opened, got = federation.run_round(vectors)
    assert opened.participants == federation.names[:3]
    np.testing.assert_array_equal(got, federation.plain_sum(vectors, federation.names[:3]))
    batch.add_shares(*late)
    opened, got = federation.run_round(vectors, slot=1, round=2)
    assert opened.participants == federation.names
    np.testing.assert_array_equal(got, federation.plain_sum(vectors, federation.names))


def test_too_few_survivors_or_replies_make_the_round_void_and_the_next_one_counts():
    federation = Federation(5)  # four of them open a sum
    federation.set_up(slots=4)
    vectors = federation.vectors()
    with pytest.raises(ProtocolError, match="3 of 5 sites are there; it takes 4"):
        federation.run_round(vectors, 0, 1, no_vector=federation.names[:2])
    with pytest.raises(ProtocolError, match="it takes 4"):
        federation.run_round(vectors, 1, 2, no_unmask=federation.names[:2])
    with pytest.raises(ProtocolError, match="it takes 4"):
        federation.run_round(vectors, 2, 3, no_vector=federation.names[:1], no_unmask=federation.names[3:])
    _, got = federation.run_round(vectors, 3, 4)
    np.testing.assert_array_equal(got, federation.plain_sum(vectors, federation.names))


def test_replies_that_come_after_an_attempt_to_finish_still_open_the_sum():
    federation = Federation(4)
    federation.set_up()
    vectors = federation.vectors()
    opened = federation.begin()
    for name in federation.names:
        opened.add(name, *federation.mask(opened, name, vectors[name]))
    orders = opened.unmask_orders()
    for name in federation.names:
        with pytest.raises(ProtocolError, match="can be opened; it takes 3"):
            opened.finish()
        opened.add_unmasked(name, federation.answer(name, "unmask", orders[name]))
        if name == federation.names[2]:
            break
    np.testing.assert_array_equal(opened.finish(), federation.plain_sum(vectors, federation.names))
    np.testing.assert_array_equal(opened.finish(), federation.plain_sum(vectors, federation.names))


def test_too_few_sites_for_a_cohort_or_a_round_are_said_plainly():
    federation = Federation(5)
    with pytest.raises(ProtocolError, match="2 of 2 sites are there; it takes 3"):
        federation.set_up(no_keys=federation.names[2:])
    with pytest.raises(ProtocolError, match="among 0 sites"):
        federation.set_up(no_keys=federation.names)
    federation.set_up(no_shares=federation.names[3:])
    with pytest.raises(ProtocolError, match="3 of 5 sites are there; it takes 4"):
        federation.begin()
    with pytest.raises(ProtocolError, match="no site is there"):
        ServerRound(federation.batch, 0, 1, CONTEXT, 8, [])
