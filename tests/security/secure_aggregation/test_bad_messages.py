"""A truncated, doubled, foreign, stale or altered message is refused with a reason, and the round goes on."""

import json

import numpy as np
import pytest

from core_training.foundation.errors import ProtocolError
from security.secure_aggregation.server import ServerBatch
from tests.security.secure_aggregation.federation import RUN, Federation

NAMES = ["site-00", "site-01", "site-02", "site-03"]


def altered(message: bytes, *path: str | int) -> bytes:
    """The message with one character of one string in it changed."""
    document = json.loads(message)
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    text = inner[path[-1]]
    inner[path[-1]] = ("B" if text[0] == "A" else "A") + text[1:]
    return json.dumps(document).encode()


def refuse(call, *arguments, match):
    with pytest.raises(ProtocolError, match=match) as refused:
        call(*arguments)
    assert not refused.value.fatal


def test_bad_messages_are_refused_at_every_step_and_the_sum_is_exact():
    federation = Federation(4)
    stale = federation.set_up(slots=2, number=0)
    stale_keys, stale_shares = federation.view[:4], federation.view[4:]
    stale_opened = federation.begin()
    for name in NAMES:
        stale_opened.add(name, *federation.mask(stale_opened, name, federation.vectors()[name]))
    stale_masked = {name: federation.view[8 + 2 * place].decode() for place, name in enumerate(NAMES)}
    stale_unmasked = {
        name: federation.answer(name, "unmask", order) for name, order in stale_opened.unmask_orders().items()
    }
    batch = ServerBatch(RUN, 1, 2, federation.roster, federation.terms)

    answers = {name: federation.answer(name, "keys", batch.keys_order()) for name in NAMES}
    refuse(batch.add_keys, "site-00", answers["site-00"][:-9], match="keys of site-00: ")
    refuse(batch.add_keys, "site-00", answers["site-01"], match="signature")
    refuse(batch.add_keys, "site-00", stale_keys[0], match="'batch' is not what it must be")
    refuse(batch.add_keys, "site-00", altered(answers["site-00"], "document", "mask", 0), match="signature")
    refuse(batch.add_keys, "site-00", altered(answers["site-00"], "signature"), match="signature")
    refuse(batch.add_keys, "site-00", answers["site-00"] * 100, match="bytes, and the longest such message has")
    refuse(batch.add_keys, "a stranger", answers["site-00"], match="the roster has no such site")
    for name in NAMES:
        batch.add_keys(name, answers[name])
    refuse(batch.add_keys, "site-00", answers["site-00"], match="twice")

    orders = batch.shares_orders()
    answers = {name: federation.answer(name, "shares", orders[name]) for name in NAMES}
    refuse(batch.add_shares, "site-00", answers["site-00"][:-9], match="shares of site-00: ")
    refuse(batch.add_shares, "site-00", answers["site-01"], match="signature")
    refuse(batch.add_shares, "site-00", stale_shares[0], match="'batch' is not what it must be")
    refuse(batch.add_shares, "site-00", altered(answers["site-00"], "slots", 1, "sealed", 2), match="'shares' is not")
    refuse(batch.add_shares, "site-00", altered(answers["site-00"], "slots", 0, "own_mask"), match="'shares' is not")
    refuse(batch.add_shares, "site-00", answers["site-00"] * 20, match="the longest such message has")
    for name in NAMES:
        batch.add_shares(name, answers[name])
    refuse(batch.add_shares, "site-00", answers["site-00"], match="twice")
    refuse(batch.add_keys, "site-00", stale_keys[0], match="after the cohort was fixed")

    federation.batch = batch
    opened = federation.begin(round=2)
    vectors = federation.vectors(seed=3)
    refuse(opened.mask_order, "a stranger", match="dealt no shares")
    masked = {name: federation.mask(opened, name, vectors[name], round=2) for name in NAMES}
    statement, vector = masked["site-00"]
    refuse(opened.add, "site-00", statement[:-9], vector, match="masked vector of site-00")
    refuse(opened.add, "site-00", masked["site-01"][0], vector, match="signature")
    refuse(opened.add, "site-00", stale_masked["site-00"], vector, match="'attempt' is not")
    refuse(opened.add, "site-00", statement, masked["site-01"][1], match="'vector' is not")
    refuse(opened.add, "site-00", statement, vectors["site-00"], match="'vector' is not")
    refuse(opened.add, "site-00", statement, vector[:-1], match=r"uint16 \(7,\), not uint16 \(8,\)")
    refuse(opened.add, "site-00", statement, vector.astype(np.uint32), match="uint32")
    refuse(opened.add, "a stranger", statement, vector, match="not asked")
    for name in NAMES:
        opened.add(name, *masked[name])
    refuse(opened.add, "site-00", *masked["site-00"], match="twice")
    refuse(opened.add_unmasked, "site-00", stale_unmasked["site-00"], match="too early")

    orders = opened.unmask_orders()
    refuse(opened.add, "site-00", *masked["site-00"], match="too late")
    answers = {name: federation.answer(name, "unmask", orders[name]) for name in NAMES}
    refuse(opened.add_unmasked, "site-00", answers["site-00"][:-9], match="unmasked of site-00: ")
    refuse(opened.add_unmasked, "site-00", answers["site-01"], match="signature")
    refuse(opened.add_unmasked, "site-00", stale_unmasked["site-00"], match="'attempt' is not")
    refuse(opened.add_unmasked, "site-00", altered(answers["site-00"], "document", "pads", 1), match="signature")
    refuse(opened.add_unmasked, "a stranger", answers["site-00"], match="not among the survivors")
    for name in NAMES:
        opened.add_unmasked(name, answers[name])
    refuse(opened.add_unmasked, "site-00", answers["site-00"], match="twice")
    np.testing.assert_array_equal(opened.finish(), federation.plain_sum(vectors, NAMES))
    assert stale.sites == NAMES


def test_a_vector_of_another_context_is_refused():
    federation = Federation(4)
    federation.set_up()
    opened = federation.begin()
    answer = federation.mask(opened, "site-00", federation.vectors()["site-00"], context=bytes(32))
    refuse(opened.add, "site-00", *answer, match="'context' is not")


def test_a_vector_that_comes_after_the_end_is_no_part_of_the_sum():
    federation = Federation(4)
    federation.set_up()
    vectors = federation.vectors()
    opened = federation.begin()
    masked = {name: federation.mask(opened, name, vectors[name]) for name in NAMES}
    for name in NAMES[1:]:
        opened.add(name, *masked[name])
    orders = opened.unmask_orders()
    refuse(opened.add, "site-00", *masked["site-00"], match="too late")
    for name, order in orders.items():
        opened.add_unmasked(name, federation.answer(name, "unmask", order))
    np.testing.assert_array_equal(opened.finish(), federation.plain_sum(vectors, NAMES[1:]))
