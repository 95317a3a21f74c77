"""The secrets of a slot have nothing in common but their seed, and no key serves two purposes, slots or pairs."""

import itertools

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from core_training.foundation.errors import ProtocolError
from security.secure_aggregation.keys import (
    MASK_KEY,
    OWN_MASK,
    PAD_INTERCEPT,
    PAD_SLOPE,
    SHARES_BYTES,
    SlotSecrets,
    open_reply,
    own_mask,
    pad_share,
    pair_mask,
    seal,
    seal_reply,
    unseal,
)
from security.secure_aggregation.shamir import PRIME, join

SEED = bytes(range(32))
PLACE = ["run", 1, 2, "roster", "terms"]
PARTS = (MASK_KEY, OWN_MASK, PAD_INTERCEPT, PAD_SLOPE)
LIST = bytes(range(32, 64))
KEYS = [X25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in range(1, 4)]
PUBLIC = [key.public_key().public_bytes_raw() for key in KEYS]


def test_a_seed_gives_five_secrets_and_another_seed_five_others():
    def secrets(seed):
        slot = SlotSecrets(seed)
        shares = {1 + place: share for place, share in enumerate(slot.shares(2, 2))}
        shared = [join({x: int.from_bytes(share[part]) for x, share in shares.items()}) for part in PARTS]
        return {slot.seal_key.private_bytes_raw(), *(value.to_bytes(32) for value in shared)}

    first, second = secrets(SEED), secrets(bytes(32))
    assert len(first) == len(second) == 5
    assert not first & second
    assert {SlotSecrets(SEED).mask_key.private_bytes_raw(), SlotSecrets(SEED).own_mask} <= first


@given(st.binary(min_size=32, max_size=32), st.integers(1, 6), st.data())
def test_any_threshold_of_the_shares_give_each_secret_and_the_pad(seed, threshold, data):
    slot = SlotSecrets(seed)
    shares = slot.shares(threshold, 8)
    assert {len(share) for share in shares} == {SHARES_BYTES}
    chosen = data.draw(st.permutations(range(1, 9)))[:threshold]
    assert join({x: int.from_bytes(shares[x - 1][OWN_MASK]) for x in chosen}) == int.from_bytes(slot.own_mask)
    private = join({x: int.from_bytes(shares[x - 1][MASK_KEY]) for x in chosen}).to_bytes(32)
    assert private == slot.mask_key.private_bytes_raw()
    assert join({x: int.from_bytes(pad_share(shares[x - 1], LIST)) for x in chosen}) == slot.pad(LIST)


def test_no_two_of_the_shared_polynomials_have_a_coefficient_in_common():
    shares = SlotSecrets(SEED).shares(3, 5)
    for one, other in itertools.combinations(PARTS, 2):
        gaps = [(int.from_bytes(share[one]) - int.from_bytes(share[other])) % PRIME for share in shares]
        first = [(right - left) % PRIME for left, right in itertools.pairwise(gaps)]
        second = [(right - left) % PRIME for left, right in itertools.pairwise(first)]
        assert 0 not in first  # not even the linear coefficient and the quadratic one
        assert 0 not in second
        assert all(value != second[0] * (1 + place) % PRIME for place, value in enumerate(first))


def test_the_pads_of_two_lists_say_nothing_of_each_other():
    """For every pad of one list, each pad of the other fits exactly one line."""
    slot = SlotSecrets(SEED)
    other = bytes(32)
    shares = slot.shares(2, 3)
    assert slot.pad(LIST) != slot.pad(other)
    assert pad_share(shares[0], LIST) != pad_share(shares[0], other)
    mixed = {1: int.from_bytes(pad_share(shares[0], LIST)), 2: int.from_bytes(pad_share(shares[1], other))}
    with pytest.raises(ProtocolError, match="do not open it"):
        open_reply(join(mixed), seal_reply(slot.pad(LIST), b"shares"))
    assert open_reply(slot.pad(LIST), seal_reply(slot.pad(LIST), b"shares")) == b"shares"


def test_both_sites_of_a_pair_have_one_mask_and_every_other_pair_place_round_or_context_has_another():
    mask = pair_mask(KEYS[0], PUBLIC[1], PLACE, ("a", "b"), 3, LIST)
    assert pair_mask(KEYS[1], PUBLIC[0], PLACE, ("b", "a"), 3, LIST) == mask
    others = [
        pair_mask(KEYS[0], PUBLIC[2], PLACE, ("a", "b"), 3, LIST),
        pair_mask(KEYS[0], PUBLIC[1], PLACE, ("a", "c"), 3, LIST),
        pair_mask(KEYS[0], PUBLIC[1], PLACE, ("a", "b"), 4, LIST),
        pair_mask(KEYS[0], PUBLIC[1], PLACE, ("a", "b"), 3, SEED),
        *(pair_mask(KEYS[0], PUBLIC[1], place, ("a", "b"), 3, LIST) for place in changed_places()),
    ]
    own = own_mask(SEED, PLACE, "a", 3, LIST)
    others += [
        own,
        own_mask(LIST, PLACE, "a", 3, LIST),
        own_mask(SEED, PLACE, "b", 3, LIST),
        own_mask(SEED, PLACE, "a", 4, LIST),
        own_mask(SEED, PLACE, "a", 3, SEED),
        *(own_mask(SEED, place, "a", 3, LIST) for place in changed_places()),
    ]
    assert len({mask, *others}) == 1 + len(others)


def test_sealed_shares_open_for_their_receiver_from_their_sender_in_their_slot_alone():
    sealed = seal(KEYS[0], PUBLIC[1], PLACE, "a", "b", b"shares")
    assert unseal(KEYS[1], PUBLIC[0], PLACE, "a", "b", sealed) == b"shares"
    for key, public, place, sender, receiver, text in (
        (KEYS[1], PUBLIC[0], PLACE, "b", "a", sealed),
        (KEYS[1], PUBLIC[0], PLACE, "c", "b", sealed),
        (KEYS[1], PUBLIC[0], PLACE, "a", "c", sealed),
        (KEYS[2], PUBLIC[0], PLACE, "a", "b", sealed),
        (KEYS[1], PUBLIC[2], PLACE, "a", "b", sealed),
        (KEYS[1], PUBLIC[0], PLACE, "a", "b", sealed[:-1]),
        (KEYS[1], PUBLIC[0], PLACE, "a", "b", bytes([sealed[0] ^ 1]) + sealed[1:]),
        *((KEYS[1], PUBLIC[0], place, "a", "b", sealed) for place in changed_places()),
    ):
        with pytest.raises(ProtocolError, match=r"not what .* sealed for"):
            unseal(key, public, place, sender, receiver, text)
    assert seal(KEYS[1], PUBLIC[0], PLACE, "b", "a", b"shares") != sealed


def changed_places():
    for place, part in enumerate(PLACE):
        yield [*PLACE[:place], "other" if isinstance(part, str) else part + 1, *PLACE[place + 1 :]]
