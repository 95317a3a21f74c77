"""What messages and keys are bound to: another value of any part of it makes another one; no message has more in it."""

from itertools import pairwise

import pytest

from core_training.foundation.errors import ProtocolError
from security.secure_aggregation.messages import (
    Attempt,
    Batch,
    Masked,
    SlotShares,
    open_signed,
    read,
    shares_digest,
    sign,
    survivors_digest,
)
from security.signing import public_key_text, sign_document
from tests.security.secure_aggregation.federation import identity

ONE, OTHER = bytes(32), bytes(range(32))
BATCH = Batch(run="run", number=1, slots=3, roster=ONE, terms=ONE)
ATTEMPT = Attempt(run="run", batch=1, slot=2, round=3)
MASKED = Masked(site="a", attempt=ATTEMPT, keys=ONE, participants=ONE, context=ONE, vector=ONE)


def all_differ(made):
    assert len(set(map(repr, made))) == len(made)


def test_the_keys_of_a_slot_are_bound_to_run_batch_slot_roster_and_terms():
    others = [{"run": "other"}, {"number": 2}, {"roster": OTHER}, {"terms": OTHER}]
    all_differ([BATCH.place(0), BATCH.place(1), *(BATCH.model_copy(update=other).place(0) for other in others)])


def test_a_list_of_survivors_is_one_of_an_attempt_a_context_and_participants():
    attempts = [ATTEMPT.model_copy(update=other) for other in ({"run": "x"}, {"batch": 2}, {"slot": 1}, {"round": 4})]
    parts = [(OTHER, ONE, ONE), (ONE, OTHER, ONE), (ONE, ONE, OTHER)]
    made = [survivors_digest(attempt, ONE, ONE, ONE) for attempt in (ATTEMPT, *attempts)]
    all_differ([*made, *(survivors_digest(ATTEMPT, *part) for part in parts)])


def test_a_site_signs_all_that_it_deals():
    dealt = SlotShares(own_mask=ONE, commitments=[2 * ONE], sealed=[bytes(4 * 33 + 16)])
    others = [{"own_mask": OTHER}, {"commitments": [2 * OTHER]}, {"sealed": [bytes(4 * 33 + 15) + b"x"]}]
    deals = [[dealt], [dealt, dealt], *([dealt.model_copy(update=other)] for other in others)]
    all_differ([shares_digest(deal) for deal in deals])
    several = [dealt.model_copy(update=other) for other in others]
    assert all(shares_digest([one, other]) != shares_digest([other, one]) for one, other in pairwise(several))


@pytest.mark.parametrize("changed", [{"more": 1}, {"kind": "keys"}, {"attempt": {**ATTEMPT.model_dump(), "more": 1}}])
def test_a_document_with_something_else_in_it_is_refused_whoever_signed_it(changed):
    own, source = identity("a"), "masked of a"
    assert open_signed(Masked, sign(MASKED, own), "a", public_key_text(own)) == MASKED
    document = {**MASKED.model_dump(mode="json"), **changed}
    signed = sign(MASKED, own).model_copy(update=sign_document(document, own))
    with pytest.raises(ProtocolError, match=source):
        open_signed(Masked, signed, "a", public_key_text(own))


def test_an_order_with_something_else_in_it_is_refused():
    order = BATCH.to_json()
    assert read(Batch, order, "order for keys", 0, 0) == BATCH
    with pytest.raises(ProtocolError, match="order for keys: more"):
        read(Batch, order[:-1] + b',"more":1}', "order for keys", 0, 0)
