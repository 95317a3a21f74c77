"""The messages between the server and the sites, and how they are signed and read.

Canonical JSON with bytes in base64. What a site says to other sites is signed with its Ed25519 identity: the server
carries it, and can neither make nor change it. Every message names the run, the batch and the slot that it is about.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import sys
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from core_training.foundation.bounded_reading import first_error
from core_training.foundation.errors import InputError, ProtocolError
from security.secure_aggregation.keys import SHARE_BYTES, SHARES_BYTES
from security.secure_aggregation.masks import RingVector
from security.signing import canonical_json, open_signed_document, sign_document

MOST_SLOTS = 1000
_TAG = 16  # bytes that AES-GCM adds


def _from_base64(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error:
        raise ValueError("not base64") from None


Bytes = Annotated[
    bytes,
    BeforeValidator(_from_base64),
    PlainSerializer(lambda value: base64.b64encode(value).decode(), return_type=str, when_used="json"),
]
Bytes32 = Annotated[Bytes, Field(min_length=32, max_length=32)]
Share = Annotated[Bytes, Field(min_length=SHARE_BYTES, max_length=SHARE_BYTES)]
SealedShares = Annotated[Bytes, Field(min_length=SHARES_BYTES + _TAG, max_length=SHARES_BYTES + _TAG)]
Commitments = Annotated[Bytes, Field(min_length=64, max_length=64)]
Number = Annotated[int, Field(ge=0)]


class Message(BaseModel):
    """A document with exactly these fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def to_json(self) -> bytes:
        """The message as it travels."""
        return canonical_json(self.model_dump(mode="json"))

    def digest(self) -> bytes:
        """SHA-256 of the message."""
        return hashlib.sha256(self.to_json()).digest()


class Signed(Message):
    """A document and its Ed25519 signature."""

    document: dict[str, Any]
    signature: str


class Batch(Message):
    """The order for keys: so many slots of one run, with this roster and these terms (their digests)."""

    run: str
    number: Number
    slots: Annotated[int, Field(ge=1, le=MOST_SLOTS)]
    roster: Bytes32
    terms: Bytes32

    def place(self, slot: int) -> list[str | int]:
        """The bytes that every key of this slot is bound to."""
        return [self.run, self.number, slot, self.roster.hex(), self.terms.hex()]


class Attempt(Message):
    """One slot, used for one round."""

    run: str
    batch: Number
    slot: Number
    round: Number


class Keys(Message):
    """Signed: a site's public X25519 keys, one of each kind for every slot."""

    kind: Literal["keys"] = "keys"
    site: str
    batch: Batch
    mask: list[Bytes32]
    seal: list[Bytes32]

    @model_validator(mode="after")
    def _one_for_each_slot(self) -> Self:
        if not len(self.mask) == len(self.seal) == self.batch.slots:
            raise ValueError(f"{self.batch.slots} slots need as many keys of each kind")
        return self


class SharesOrder(Message):
    """The cohort (bits of the roster), and the signed keys of the receiver's holders in their order."""

    batch: Batch
    cohort: Bytes
    keys: list[Signed]


class SlotShares(Message):
    """One slot's shares, sealed to each holder, and the commitments that the server checks opened ones against."""

    own_mask: Bytes32
    commitments: list[Commitments]
    sealed: list[SealedShares]


class Dealt(Message):
    """Signed: a site dealt these shares within this cohort, with these keys (each by its digest)."""

    kind: Literal["dealt"] = "dealt"
    site: str
    batch: Batch
    cohort: Bytes32
    keys: Bytes32
    shares: Bytes32


class Deal(Message):
    """The answer to the order for shares."""

    dealt: Signed
    slots: list[SlotShares]


class MaskOrder(Message):
    """The participants of an attempt (bits of the roster), and the `Dealt` of those who mask with the receiver."""

    attempt: Attempt
    participants: Bytes
    dealt: list[Signed]


class Masked(Message):
    """Signed: this vector is masked for this attempt with these keys among these participants (each by its digest)."""

    kind: Literal["masked"] = "masked"
    site: str
    attempt: Attempt
    keys: Bytes32
    participants: Bytes32
    context: Bytes32
    vector: Bytes32


class UnmaskOrder(Message):
    """The sites with vectors in the sum, and those without; for the receiver's holders, statements and sealed shares.

    `masked` has the signed statement of each survivor, `sealed` what each participant dealt to the receiver.
    """

    attempt: Attempt
    survivors: Bytes
    dropped: Bytes
    masked: list[Signed]
    sealed: list[SealedShares]


class Unmasked(Message):
    """Signed: for one list of survivors, shares of their pads; under this site's own pad, the shares that it holds."""

    kind: Literal["unmasked"] = "unmasked"
    site: str
    attempt: Attempt
    survivors: Bytes32
    pads: list[Share]
    sealed: Bytes


AnyMessage = TypeVar("AnyMessage", bound=Message)


def read(model: type[AnyMessage], data: bytes | str, source: str, slots: int, sites: int) -> AnyMessage:
    """Read a message about so many slots and sites. Raises ProtocolError when it is too long or not of this form."""
    longest = 4096 + 1024 * (slots + 1) * (sites + 1)
    if len(data) > longest:
        raise ProtocolError(f"{source}: {len(data)} bytes, and the longest such message has {longest}")
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise ProtocolError(f"{source}: {first_error(error)}") from None


def sign(message: Message, identity: Ed25519PrivateKey) -> Signed:
    """Sign a message."""
    return Signed.model_validate(sign_document(message.model_dump(mode="json"), identity))


def open_signed(model: type[AnyMessage], signed: Signed, site: str, public_key: str) -> AnyMessage:
    """The message inside. Raises ProtocolError when `site`, with this public key, did not sign it."""
    source = f"{model.__name__.lower()} of {site}"
    try:
        document = open_signed_document(signed.model_dump(), public_key, source)
    except InputError:
        raise ProtocolError(f"{source}: the signature is not of the key that the roster has for {site}") from None
    try:
        return model.model_validate_json(canonical_json(document))
    except ValidationError as error:
        raise ProtocolError(f"{source}: {first_error(error)}") from None


def expect(message: Message, source: str, **wanted: object) -> None:
    """Raise a ProtocolError that names the first field of `message` that is not what the protocol wants there."""
    for field, value in wanted.items():
        if getattr(message, field) != value:
            raise ProtocolError(f"{source}: '{field}' is not what it must be here: stale, foreign or altered")


def vector_digest(vector: RingVector) -> bytes:
    """SHA-256 of the values in little-endian order."""
    little = vector if sys.byteorder == "little" else vector.byteswap()
    return hashlib.sha256(np.ascontiguousarray(little).data).digest()


def shares_digest(slots: list[SlotShares]) -> bytes:
    """SHA-256 of all that a site dealt, as `Dealt.shares` has it."""
    return hashlib.sha256(canonical_json([slot.model_dump(mode="json") for slot in slots])).digest()


def survivors_digest(attempt: Attempt, context: bytes, participants: bytes, survivors: bytes) -> bytes:
    """The digest of a list of survivors: 32 bytes that no other list, participants, attempt or context has."""
    parts = [part.hex() for part in (context, participants, survivors)]
    return hashlib.sha256(canonical_json([attempt.model_dump(), *parts])).digest()
