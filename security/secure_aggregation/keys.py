"""The secrets of a site in one slot, and every key made from them: each for one purpose, one slot, one pair of sites.

A slot is one attempt at one round. All that a site keeps secret about it comes from one seed of 32 bytes, so that
erasing the seed erases everything, and a restarted site that kept it says the same again.
"""

from __future__ import annotations

import hashlib
from functools import cached_property

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from core_training.foundation.errors import ProtocolError
from security.secure_aggregation.masks import derive_key, pair_key
from security.secure_aggregation.shamir import PRIME, evaluate
from security.signing import canonical_json

SHARE_BYTES = 33  # a value modulo 2^256 + 297
MASK_KEY, OWN_MASK, PAD_INTERCEPT, PAD_SLOPE = (
    slice(at, at + SHARE_BYTES) for at in range(0, 4 * SHARE_BYTES, SHARE_BYTES)
)
SHARES_BYTES = 4 * SHARE_BYTES  # a holder's shares of the four secrets of a slot, one behind the other
_ONLY_NONCE = bytes(12)  # every key below seals one message and no more


class SlotSecrets:
    """The secrets that come out of a slot's seed."""

    def __init__(self, seed: bytes) -> None:
        self._seed = seed

    @cached_property
    def mask_key(self) -> X25519PrivateKey:
        """The key that agrees on the pairwise masks. It becomes known when the site drops out."""
        return X25519PrivateKey.from_private_bytes(self._secrets[0])

    @cached_property
    def seal_key(self) -> X25519PrivateKey:
        """The key that agrees on the keys that seal shares. It never becomes known, so it is not the mask key."""
        return X25519PrivateKey.from_private_bytes(self._derive("seal"))

    @property
    def own_mask(self) -> bytes:
        """Bonawitz's b: it becomes known when the site's vector is in the sum, and the mask key then never does."""
        return self._secrets[1]

    def pad(self, survivors: bytes) -> int:
        """The pad of this site's reply about one list of survivors (its digest): a line, known at one point only."""
        return _pad_at(self._secrets[2], self._secrets[3], survivors)

    def shares(self, threshold: int, holders: int) -> list[bytes]:
        """For each holder `SHARES_BYTES`: a share of each secret.

        The coefficients are 32 bytes each, even over all of the field but 297 of 2^256 values.
        """
        degree = threshold - 1
        stream = self._derive("coefficients", len(self._secrets) * degree * 32)
        drawn = [int.from_bytes(stream[first : first + 32]) for first in range(0, len(stream), 32)]
        polynomials = [
            [int.from_bytes(secret), *drawn[number * degree : (number + 1) * degree]]
            for number, secret in enumerate(self._secrets)
        ]
        return [
            b"".join(evaluate(polynomial, holder).to_bytes(SHARE_BYTES) for polynomial in polynomials)
            for holder in range(1, holders + 1)
        ]

    @cached_property
    def _secrets(self) -> list[bytes]:
        return [self._derive(purpose) for purpose in ("mask key", "own mask", "pad intercept", "pad slope")]

    def _derive(self, purpose: str, length: int = 32) -> bytes:
        return derive_key(self._seed, b"", purpose.encode(), length)


def pair_mask(
    own: X25519PrivateKey, other: bytes, place: list[str | int], pair: tuple[str, str], round: int, context: bytes
) -> bytes:
    """The key of the mask that the lower of two names adds and the higher subtracts in this round of this slot."""
    info = canonical_json(["pair", *place, *sorted(pair), round, context.hex()])
    return pair_key(own, other, canonical_json(place), info)


def own_mask(secret: bytes, place: list[str | int], site: str, round: int, context: bytes) -> bytes:
    """The key of the mask that a site adds by itself."""
    return derive_key(secret, canonical_json(place), canonical_json(["own", *place, site, round, context.hex()]))


def pad_share(shares: bytes, survivors: bytes) -> bytes:
    """A holder's share of a pad at one list of survivors: the line through its shares of the two coefficients."""
    return _pad_at(shares[PAD_INTERCEPT], shares[PAD_SLOPE], survivors).to_bytes(SHARE_BYTES)


def commitment(secret: bytes) -> bytes:
    """SHA-256 of a random secret: says nothing about it, and no other secret has the same."""
    return hashlib.sha256(secret).digest()


def seal(own: X25519PrivateKey, other: bytes, place: list[str | int], sender: str, receiver: str, text: bytes) -> bytes:
    """Seal the shares that `sender` deals to `receiver` in the slot at `place`."""
    key, info = _sealing(own, other, place, sender, receiver)
    return AESGCM(key).encrypt(_ONLY_NONCE, text, info)


def unseal(
    own: X25519PrivateKey, other: bytes, place: list[str | int], sender: str, receiver: str, sealed: bytes
) -> bytes:
    """Open what `seal` made. Raises ProtocolError when it is another's, of another slot, or was changed."""
    key, info = _sealing(own, other, place, sender, receiver)
    try:
        return AESGCM(key).decrypt(_ONLY_NONCE, sealed, info)
    except InvalidTag:
        raise ProtocolError(f"shares of {sender}: not what {sender} sealed for {receiver} and this slot") from None


def seal_reply(pad: int, text: bytes) -> bytes:
    """Seal a reply about survivors: who has `threshold` shares of the pad at the same list can open it."""
    return AESGCM(_reply_key(pad)).encrypt(_ONLY_NONCE, text, None)


def open_reply(pad: int, sealed: bytes) -> bytes:
    """Open what `seal_reply` made. Raises ProtocolError with another pad."""
    try:
        return AESGCM(_reply_key(pad)).decrypt(_ONLY_NONCE, sealed, None)
    except InvalidTag:
        raise ProtocolError("the shares of its pad do not open it") from None


def _pad_at(intercept: bytes, slope: bytes, survivors: bytes) -> int:
    return (int.from_bytes(intercept) + int.from_bytes(slope) * int.from_bytes(survivors)) % PRIME


def _reply_key(pad: int) -> bytes:
    return derive_key(pad.to_bytes(SHARE_BYTES), b"", b"reply")


def _sealing(
    own: X25519PrivateKey, other: bytes, place: list[str | int], sender: str, receiver: str
) -> tuple[bytes, bytes]:
    info = canonical_json(["seal", *place, sender, receiver])
    return pair_key(own, other, canonical_json(place), info), info
