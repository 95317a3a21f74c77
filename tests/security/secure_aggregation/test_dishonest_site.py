"""A site of the roster that signs what is not so can spoil a round; it cannot make the others' sum a wrong one."""

import json

import numpy as np
import pytest

from core_training.foundation.errors import ProtocolError
from security.secure_aggregation.keys import SlotSecrets, commitment
from security.secure_aggregation.messages import (
    Attempt,
    Deal,
    Dealt,
    Keys,
    Masked,
    Signed,
    SlotShares,
    Unmasked,
    shares_digest,
    sign,
)
from security.secure_aggregation.server import ServerBatch
from security.secure_aggregation.terms import Terms
from tests.security.secure_aggregation.federation import RUN, Federation, identity

LIAR = "site-01"
THREE_OF_FIVE = Terms(3, 3, 16, 1.0)


def inside(model, signed: Signed | bytes):
    signed = signed if isinstance(signed, Signed) else Signed.model_validate_json(signed)
    return model.model_validate_json(json.dumps(signed.document))


def signed_again(model, answer: bytes, **changes: object) -> bytes:
    return sign(inside(model, answer).model_copy(update=changes), identity(LIAR)).to_json()


def test_keys_that_give_everybody_the_same_secret_or_are_too_few_are_refused():
    federation = Federation(4)
    batch = ServerBatch(RUN, 0, 2, federation.roster, federation.terms)
    answer = federation.answer(LIAR, "keys", batch.keys_order())
    for field in ("mask", "seal"):
        with pytest.raises(ProtocolError, match="X25519 public key"):
            batch.add_keys(LIAR, signed_again(Keys, answer, **{field: [b"\1" + bytes(31)] * 2}))
        with pytest.raises(ProtocolError, match="2 slots need as many keys of each kind"):
            batch.add_keys(LIAR, signed_again(Keys, answer, **{field: [b"\7" * 32]}))
    with pytest.raises(ProtocolError, match="'site' is not what it must be"):
        batch.add_keys(LIAR, signed_again(Keys, answer, site="site-02"))
    batch.add_keys(LIAR, answer)


def set_up_with(federation: Federation, lie) -> None:
    """A set-up of one slot in which the liar changes what it deals."""
    batch = ServerBatch(RUN, 0, 1, federation.roster, federation.terms)
    for name in federation.names:
        batch.add_keys(name, federation.answer(name, "keys", batch.keys_order()))
    for name, order in batch.shares_orders().items():
        answer = federation.answer(name, "shares", order)
        if name == LIAR:
            deal = Deal.model_validate_json(answer)
            slots = [lie(deal.slots[0])]
            dealt = inside(Dealt, deal.dealt).model_copy(update={"shares": shares_digest(slots)})
            answer = Deal(dealt=sign(dealt, identity(LIAR)), slots=slots).to_json()
        batch.add_shares(name, answer)
    federation.batch = batch


@pytest.mark.parametrize("field", ["site", "batch", "cohort", "keys", "shares"])
def test_shares_that_were_signed_for_something_else_are_refused(field):
    federation = Federation(4)
    batch = ServerBatch(RUN, 0, 1, federation.roster, federation.terms)
    for name in federation.names:
        batch.add_keys(name, federation.answer(name, "keys", batch.keys_order()))
    answer = federation.answer(LIAR, "shares", batch.shares_orders()[LIAR])
    deal = Deal.model_validate_json(answer)
    lies = {"site": "site-02", "batch": batch.batch.model_copy(update={"number": 7})}
    said = inside(Dealt, deal.dealt).model_copy(update={field: lies.get(field, bytes(32))})
    with pytest.raises(ProtocolError, match=f"shares of {LIAR}: '{field}' is not what it must be"):
        batch.add_shares(LIAR, Deal(dealt=sign(said, identity(LIAR)), slots=deal.slots).to_json())
    batch.add_shares(LIAR, answer)


@pytest.mark.parametrize("field", ["site", "attempt", "keys", "participants", "context", "vector"])
def test_a_vector_that_was_signed_for_something_else_is_in_no_sum(field):
    federation = Federation(4)
    federation.set_up()
    opened = federation.begin()
    statement, vector = federation.mask(opened, LIAR, federation.vectors()[LIAR])
    lies = {"site": "site-02", "attempt": Attempt(run=RUN, batch=0, slot=0, round=2)}
    lie = signed_again(Masked, statement.encode(), **{field: lies.get(field, bytes(32))}).decode()
    with pytest.raises(ProtocolError, match=f"masked vector of {LIAR}: '{field}' is not what it must be"):
        opened.add(LIAR, lie, vector)
    opened.add(LIAR, statement, vector)


def test_shares_for_too_few_holders_are_refused():
    for field in ("commitments", "sealed"):
        with pytest.raises(ProtocolError, match="1 slots need a share for each of 5"):
            set_up_with(
                Federation(5, THREE_OF_FIVE),
                lambda slot, field=field: slot.model_copy(update={field: getattr(slot, field)[1:]}),
            )


def test_a_dealer_whose_shares_open_for_nobody_is_named_by_every_site():
    federation = Federation(5, THREE_OF_FIVE)
    set_up_with(federation, lambda slot: slot.model_copy(update={"sealed": slot.sealed[::-1]}))
    opened = federation.begin()
    for name, vector in federation.vectors().items():
        opened.add(name, *federation.mask(opened, name, vector))
    for name, order in opened.unmask_orders().items():
        if name != "site-02":  # in the middle, where the reversed order has its own
            with pytest.raises(ProtocolError, match=f"shares of {LIAR}: not what {LIAR} sealed for {name}"):
                federation.answer(name, "unmask", order)


@pytest.mark.parametrize("drops_out", [False, True])
def test_a_dealer_whose_shares_give_another_secret_makes_no_wrong_sum(drops_out):
    """It commits to the shares of one seed, and signed the mask key of another: only the sum's opening can tell."""
    federation = Federation(5, THREE_OF_FIVE)
    other = SlotSecrets(b"\5" * 32)

    def lie(slot: SlotShares) -> SlotShares:
        protocol = federation.sites[LIAR]
        real = SlotSecrets(protocol._record.seeds[0])
        other.__dict__["seal_key"] = real.seal_key
        protocol._secrets = lambda number: other
        made = protocol._slot_shares(0, 3, protocol._record.dealing.keys)
        del protocol._secrets
        return made.model_copy(update={"own_mask": commitment(real.own_mask)})

    set_up_with(federation, lie)
    with pytest.raises(ProtocolError, match=f"the shares that {LIAR} dealt do not give the secret that it signed"):
        federation.run_round(federation.vectors(), no_vector=[LIAR] if drops_out else [])


def test_commitments_to_other_shares_void_the_round_and_tell_whose_they_are():
    federation = Federation(5, THREE_OF_FIVE)
    set_up_with(federation, lambda slot: slot.model_copy(update={"commitments": slot.commitments[::-1]}))
    with pytest.raises(ProtocolError, match=f"1 shares of what {LIAR} dealt .*; site-00 gave a wrong share of {LIAR}"):
        federation.run_round(federation.vectors())


@pytest.mark.parametrize("lie", ["sealed", "pads", "few pads", "sealed, others enough", "pads, others enough"])
def test_a_reply_that_lies_is_left_out_or_voids_the_round(lie):
    federation = Federation(5, THREE_OF_FIVE)
    federation.set_up()
    vectors = federation.vectors()
    opened = federation.begin()
    for name in federation.names:
        opened.add(name, *federation.mask(opened, name, vectors[name]))
    orders = opened.unmask_orders()
    answer = federation.answer(LIAR, "unmask", orders[LIAR])
    pads = inside(Unmasked, answer).pads
    if lie == "few pads":
        with pytest.raises(ProtocolError, match="4 shares of pads for 5 survivors"):
            opened.add_unmasked(LIAR, signed_again(Unmasked, answer, pads=pads[1:]))
        return
    changes = {"pads": pads[::-1]} if lie.startswith("pads") else {"sealed": bytes(33 * 5 + 16)}
    opened.add_unmasked(LIAR, signed_again(Unmasked, answer, **changes))
    enough = lie.endswith("others enough")
    for name in federation.names[2:] if enough else federation.names[2:4]:
        opened.add_unmasked(name, federation.answer(name, "unmask", orders[name]))
    if enough:
        np.testing.assert_array_equal(opened.finish(), federation.plain_sum(vectors, federation.names))
    else:
        with pytest.raises(ProtocolError, match=r"it takes 3; the reply of site-0. does not open"):
            opened.finish()
