"""A site that is killed at any moment takes part again; nothing that it masks or says twice differs."""

import itertools
import json

import numpy as np
import pytest

from core_training.foundation.errors import ProtocolError
from security.secure_aggregation.server import ServerBatch, ServerRound
from tests.security.secure_aggregation.federation import CONTEXT, RUN, Federation


def test_every_site_restarted_after_every_step_makes_no_difference():
    sums = []
    for restarts in (False, True):
        federation = Federation(4)

        def restart(federation=federation, restarts=restarts):
            for name in federation.names if restarts else ():
                federation.restart(name)

        batch = ServerBatch(RUN, 0, 2, federation.roster, federation.terms)
        for name in federation.names:
            batch.add_keys(name, federation.answer(name, "keys", batch.keys_order()))
        restart()
        for name, order in batch.shares_orders().items():
            batch.add_shares(name, federation.answer(name, "shares", order))
        federation.batch = batch
        for slot in range(2):
            restart()
            opened = federation.begin(slot, round=slot)
            vectors = federation.vectors(seed=slot)
            for name in federation.names:
                opened.add(name, *federation.mask(opened, name, vectors[name], round=slot))
            restart()
            for name, order in opened.unmask_orders().items():
                opened.add_unmasked(name, federation.answer(name, "unmask", order))
            sums.append(opened.finish().tolist())
            assert sums[-1] == federation.plain_sum(vectors, federation.names).tolist()
    assert sums[:2] == sums[2:]


def test_the_same_question_has_the_same_answer_also_after_a_restart():
    federation = Federation(4)
    batch = federation.set_up()
    name = federation.names[1]
    vectors = federation.vectors()

    def twice(ask):
        first = ask()
        record = federation.sites[name].record
        assert ask() == first
        federation.restart(name)
        assert ask() == first
        assert federation.sites[name].record == record
        return first

    shares = batch.shares_orders()[name]
    assert twice(lambda: federation.answer(name, "shares", shares)) == federation.view[5]
    opened = federation.begin()

    def mask():
        statement, masked = federation.mask(opened, name, vectors[name])
        return statement, masked.tobytes()

    statement, masked = twice(mask)
    opened.add(name, statement, np.frombuffer(masked, np.uint16))
    for other in federation.names:
        if other != name:
            opened.add(other, *federation.mask(opened, other, vectors[other]))
    orders = opened.unmask_orders()
    opened.add_unmasked(name, twice(lambda: federation.answer(name, "unmask", orders[name])))
    for other in federation.names:
        if other != name:
            opened.add_unmasked(other, federation.answer(other, "unmask", orders[other]))
    np.testing.assert_array_equal(opened.finish(), federation.plain_sum(vectors, federation.names))


def test_a_restarted_site_whose_training_gave_other_values_sends_nothing():
    federation = Federation(4)
    federation.set_up()
    opened = federation.begin()
    name = federation.names[0]
    federation.mask(opened, name, federation.vectors()[name])
    federation.restart(name)
    vector = federation.vectors(seed=5)[name]
    with pytest.raises(ProtocolError, match="another vector"):
        federation.sites[name].mask(1, opened.mask_order(name), CONTEXT, vector)
    assert not vector.any()


def test_secrets_of_a_slot_are_gone_when_it_is_over():
    federation = Federation(4)
    federation.set_up(slots=4)
    name = federation.names[0]

    def seeds():
        return federation.sites[name].record["seeds"]

    first = seeds()
    assert len(set(first)) == 4
    federation.run_round(federation.vectors())
    assert seeds() == [None, *first[1:]]  # its shares are given
    opened = federation.begin(2, round=2)
    federation.mask(opened, name, federation.vectors()[name], round=2)
    assert seeds() == [None, None, *first[2:]]  # a slot that was passed over
    opened = federation.begin(3, round=3)
    federation.mask(opened, name, federation.vectors()[name], round=3)
    assert seeds() == [None, None, None, first[3]]  # one that was never unmasked
    federation.sites[name].erase()
    record = federation.sites[name].record
    assert not any(secret in json.dumps(record) for secret in first)
    assert record["last_round"] == 3
    with pytest.raises(ProtocolError, match="ask for shares first"):
        federation.mask(opened, name, federation.vectors()[name], round=4)
    federation.set_up(number=1)
    again = ServerRound(federation.batch, 0, 3, CONTEXT, 8, federation.names)
    with pytest.raises(ProtocolError, match="round 3: this site masked round 3"):
        federation.mask(again, name, federation.vectors()[name], round=3)


def test_a_seed_is_all_that_a_record_keeps_secret_and_two_sites_have_none_in_common():
    federation = Federation(3)
    federation.set_up(slots=2)
    seeds = [set(federation.sites[name].record["seeds"]) for name in federation.names]
    assert not any(one & other for one, other in itertools.combinations(seeds, 2))


def test_a_restarted_server_asks_for_the_same_slot_again_and_gets_the_same_vectors():
    federation = Federation(4)
    first = federation.set_up(slots=2)
    vectors = federation.vectors()
    opened = federation.begin()
    masked = {name: federation.mask(opened, name, vectors[name]) for name in federation.names}
    record = json.loads(json.dumps(first.record))
    federation.batch = ServerBatch(RUN, 0, 2, federation.roster, federation.terms, record)
    assert federation.batch.sites == first.sites
    again = federation.begin()
    for name in federation.names:
        statement, vector = federation.mask(again, name, vectors[name])
        assert (statement, vector.tolist()) == (masked[name][0], masked[name][1].tolist())
        again.add(name, statement, vector)
    for name, order in again.unmask_orders().items():
        again.add_unmasked(name, federation.answer(name, "unmask", order))
    np.testing.assert_array_equal(again.finish(), federation.plain_sum(vectors, federation.names))
    _, total = federation.run_round(vectors, slot=1, round=2)
    np.testing.assert_array_equal(total, federation.plain_sum(vectors, federation.names))


def test_a_server_restarted_within_the_set_up_goes_on_with_it():
    federation = Federation(4)
    batch = ServerBatch(RUN, 0, 1, federation.roster, federation.terms)
    for name in federation.names:
        batch.add_keys(name, federation.answer(name, "keys", batch.keys_order()))
        batch = ServerBatch(RUN, 0, 1, federation.roster, federation.terms, batch.record)
    for name, order in batch.shares_orders().items():
        batch.add_shares(name, federation.answer(name, "shares", order))
        batch = ServerBatch(RUN, 0, 1, federation.roster, federation.terms, batch.record)
    federation.batch = batch
    _, total = federation.run_round(vectors := federation.vectors())
    np.testing.assert_array_equal(total, federation.plain_sum(vectors, federation.names))
