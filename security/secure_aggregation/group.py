"""Averaging in a group of peers without a server: one attempt, seen by one member, as a state machine without I/O.

Masked reduce-scatter and all-gather. Each phase ends when the message of every other member is here:

keys     X25519 key, commitment to the own mask's seed, what the member proposes (opaque here)
scatter  to each member its chunk of the masked vector, with proof of the pair's key and digests of all keys messages
ready    all chunks have come
open     the seed of the own mask: only now can a sum be read, and only of all who were ready
gather   the sum of the own chunk
confirm  digests of all sums

Nobody sees another's vector as long as one more member keeps its keys to itself. A member that leaves before all are
ready leaves no sum behind. Whoever shows different things to different members is found by the digests: the attempt
ends with a `GroupFault` that names it. A member can falsify the sum of its own chunk, or its own vector: that is not
found. Without masks the same exchange has neither keys nor `ready` and `open`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from core_training.foundation.errors import ProtocolError
from security.secure_aggregation.masks import RingVector, add_masks, pair_key
from security.signing import canonical_json

MOST_PROPOSAL_BYTES = 1 << 20
_KEY_BYTES = 32
_DIGEST_BYTES = 32
_WAIVED = b""
"""The stand-in for the digest of a message that is not waited for."""


class Phase(StrEnum):
    """The phases of an attempt, in their order."""

    KEYS = "keys"
    SCATTER = "scatter"
    READY = "ready"
    OPEN = "open"
    GATHER = "gather"
    CONFIRM = "confirm"


_WITHOUT_MASKS = (Phase.KEYS, Phase.SCATTER, Phase.GATHER, Phase.CONFIRM)


class GroupFault(ProtocolError):
    """An attempt cannot go on, because of this member."""

    def __init__(self, member: str, reason: str) -> None:
        super().__init__(reason)
        self.member = member


@dataclass(frozen=True)
class Group:
    """The members that average in an attempt. All of them name them in the same order."""

    run_id: str
    round: int
    attempt: int
    members: tuple[str, ...]


@dataclass(frozen=True)
class RingForm:
    """The written form of a vector of `length` values: `value_bytes` each, by `pack`; `unpack` is its inverse.

    `pack` may cut values to fewer bits than numpy's, where sums stay right (24 of 32).
    """

    length: int
    value_bytes: int
    pack: Callable[[RingVector], bytes]
    unpack: Callable[[bytes], RingVector]


class GroupAttempt:
    """One member's part in one attempt.

    In each phase the caller sends `message_to` every other member and hands what comes to `take`. Once `missing` is
    empty it calls `advance` (from `keys`: `scatter`, with the vector that the group's `proposals` ask for). In the end
    `phase` is None and `total` holds the sum. An attempt that failed is thrown away; the next one has fresh keys.
    """

    def __init__(
        self,
        name: str,
        group: Group,
        proposal: bytes,
        form: RingForm,
        *,
        masked: bool,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.group = group
        self.phase: Phase | None = Phase.KEYS
        self.proposals = {name: proposal}
        self._name = name
        self._others = [member for member in group.members if member != name]
        self._form = form
        self._masked = masked
        self._phases = tuple(Phase) if masked else _WITHOUT_MASKS
        self._digests: dict[tuple[Phase, str], bytes] = {}
        self._parked: dict[str, bytes] = {}
        self._own_keys = proposal
        if masked:
            self._private = X25519PrivateKey.from_private_bytes(random(_KEY_BYTES))
            self._seed = random(_KEY_BYTES)
            public = self._private.public_key().public_bytes_raw()
            # A commitment, so that no member can choose its seed by what the others open.
            self._own_keys = public + _sha256(self._seed) + proposal
        self._keys: dict[str, bytes] = {}
        self._commitments: dict[str, bytes] = {}
        self._proofs: dict[str, bytes] = {}
        self._seeds: dict[str, bytes] = {}
        self._digests[Phase.KEYS, name] = _sha256(self._own_keys)

    @property
    def missing(self) -> list[str]:
        """The members whose message of this phase has not come."""
        return [member for member in self._others if (self.phase, member) not in self._digests]

    @property
    def total(self) -> RingVector:
        """The sum of all members' vectors."""
        assert self.phase is None
        return self._vector

    def most_bytes(self, phase: Phase, sender: str) -> int:
        """The most bytes that a message of a phase can have."""
        views = _DIGEST_BYTES * len(self.group.members)
        match phase:
            case Phase.KEYS:
                return 2 * _KEY_BYTES + MOST_PROPOSAL_BYTES
            case Phase.SCATTER:
                return views + _KEY_BYTES * self._masked + self._chunk_bytes(self._name)
            case Phase.GATHER:
                return self._chunk_bytes(sender)
            case Phase.OPEN:
                return _KEY_BYTES
            case Phase.CONFIRM:
                return views
            case _:
                return 0

    def message_to(self, member: str) -> bytes:
        """The message to a member in this phase."""
        match self.phase:
            case Phase.KEYS:
                return self._own_keys
            case Phase.SCATTER:
                proof = self._proof(self._name, member) if self._masked else b""
                return self._views(Phase.KEYS) + proof + self._form.pack(self._vector[self._chunk(member)])
            case Phase.OPEN:
                return self._seed
            case Phase.GATHER:
                return self._form.pack(self._vector[self._chunk(self._name)])
            case Phase.CONFIRM:
                return self._views(Phase.GATHER)
            case _:
                return b""

    def take(self, sender: str, phase: Phase, message: bytes) -> None:
        """Take a message of this phase, or of the next from a member that is ahead. The same one again changes nothing.

        Raises GroupFault: the attempt is over.
        """
        digest = _sha256(message)
        if (before := self._digests.get((phase, sender))) is not None:
            if before not in (digest, _WAIVED):
                raise GroupFault(sender, f"two different messages of phase '{phase}' in one attempt")
            return
        place = self._phases.index(phase) - self._phases.index(self.phase) if self.phase else -1
        # Nobody gets two phases ahead without this member's message of the phase between.
        if sender not in self._others or place not in (0, 1):
            raise GroupFault(sender, f"a message of phase '{phase}' in phase '{self.phase}'")
        most = self.most_bytes(phase, sender)
        if len(message) > most or (phase is not Phase.KEYS and len(message) != most):
            raise GroupFault(sender, f"{len(message)} bytes in phase '{phase}' where {most} are right")
        self._digests[phase, sender] = digest
        if place == 1:
            # Not used before this member is in that phase too: what it is checked against may not be here yet.
            self._parked[sender] = message
        else:
            self._use(sender, message)

    def do_without(self, member: str, reason: str) -> None:
        """Go on without a member that is down or silent. The sum is whole when more than half have confirmed it;
        before, the attempt is over: raises GroupFault."""
        confirmed = len(self.group.members) - len(self.missing)
        if self.phase is not Phase.CONFIRM or 2 * confirmed <= len(self.group.members):
            raise GroupFault(member, reason)
        # `take` then passes over a confirmation that comes late, and does not call it a second message.
        self._digests[Phase.CONFIRM, member] = _WAIVED

    def scatter(self, vector: RingVector) -> None:
        """Go from `keys` to `scatter` with this member's vector, which is masked in place and becomes the sum."""
        assert self.phase is Phase.KEYS
        self._vector = vector
        if self._masked:
            self._mask()
        self._enter(Phase.SCATTER)

    def advance(self) -> None:
        """Go to the next phase. Raises GroupFault for what a member that is ahead had sent for it."""
        assert self.phase is not None
        place = self._phases.index(self.phase) + 1
        if place == len(self._phases):
            self.phase = None
            return
        phase = self._phases[place]
        if phase is Phase.GATHER:
            # Before the phase begins, since the open sum is the message of it.
            self._unmask_own_chunk()
        self._enter(phase)

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        parked, self._parked = self._parked, {}
        for sender, message in parked.items():
            self._use(sender, message)

    def _use(self, sender: str, message: bytes) -> None:
        match self.phase:
            case Phase.KEYS:
                self._use_keys(sender, message)
            case Phase.SCATTER:
                self._use_scattered(sender, message)
            case Phase.OPEN:
                # Another seed would leave its mask in the sum, and nobody could say whose it was.
                if not hmac.compare_digest(_sha256(message), self._commitments[sender]):
                    raise GroupFault(sender, "the seed is not the one that it committed to")
                self._seeds[sender] = message
            case Phase.GATHER:
                self._vector[self._chunk(sender)] = self._form.unpack(message)
            case Phase.CONFIRM:
                self._compare(sender, message, Phase.GATHER, "sums")

    def _use_keys(self, sender: str, message: bytes) -> None:
        if self._masked:
            if len(message) < 2 * _KEY_BYTES:
                raise GroupFault(sender, "its keys are cut off")
            self._keys[sender] = message[:_KEY_BYTES]
            self._commitments[sender] = message[_KEY_BYTES : 2 * _KEY_BYTES]
            message = message[2 * _KEY_BYTES :]
        self.proposals[sender] = message

    def _mask(self) -> None:
        """Add the own mask and one for each pair, which the other of the pair takes away again."""
        # All keys and the attempt are in the salt: a mask fits one attempt among members that saw the same keys.
        self._salt = _sha256(canonical_json([*self._where(), self._views(Phase.KEYS).hex()]))
        order = self.group.members.index
        added, subtracted = [self._seed], list[bytes]()
        for other in self._others:
            pair = sorted([self._name, other], key=order)
            (added if self._name == pair[0] else subtracted).append(self._pair_key(other, "mask", *pair))
            self._proofs[other] = self._proof(other, other)
        add_masks(self._vector, added, subtracted)

    def _proof(self, sender: str, other: str) -> bytes:
        # Each direction has a proof of its own, or a member could send back the one that it was shown.
        receiver = other if sender == self._name else self._name
        return self._pair_key(other, "proof", sender, receiver)

    def _pair_key(self, other: str, *purpose: str) -> bytes:
        try:
            return pair_key(self._private, self._keys[other], self._salt, canonical_json(list(purpose)))
        except ProtocolError as error:
            raise GroupFault(other, str(error)) from None

    def _use_scattered(self, sender: str, message: bytes) -> None:
        views = _DIGEST_BYTES * len(self.group.members)
        # Before the chunk is added: among members that saw other keys the masks do not cancel.
        self._compare(sender, message[:views], Phase.KEYS, "keys")
        if self._masked:
            proof, views = message[views : views + _KEY_BYTES], views + _KEY_BYTES
            # Without this a member could pass off another's public key as its own.
            if not hmac.compare_digest(proof, self._proofs[sender]):
                raise GroupFault(sender, "it does not hold the key that it showed")
        own = self._vector[self._chunk(self._name)]
        own += self._form.unpack(message[views:])

    def _unmask_own_chunk(self) -> None:
        chunk = self._chunk(self._name)
        own = self._vector[chunk]
        if self._masked:
            add_masks(own, (), [self._seed, *self._seeds.values()], start=chunk.start)
        # Written and read as the others read it, so that all end with the same bits (24 of 32).
        written = self._form.pack(own)
        self._vector[chunk] = self._form.unpack(written)
        self._digests[Phase.GATHER, self._name] = _sha256(written)

    def _views(self, phase: Phase) -> bytes:
        """The digest of what each member has sent in a phase, as this one saw it."""
        return b"".join(self._digests[phase, member] for member in self.group.members)

    def _compare(self, sender: str, theirs: bytes, phase: Phase, what: str) -> None:
        """Raise GroupFault unless a member saw what this one saw. Whoever showed it differently is to blame: one
        member, or the one that says so of several, or of this one."""
        differ = [
            member
            for place, member in enumerate(self.group.members)
            if theirs[place * _DIGEST_BYTES :][:_DIGEST_BYTES] != self._digests[phase, member]
        ]
        if differ:
            blamed = differ[0] if len(differ) == 1 and differ[0] != self._name else sender
            raise GroupFault(blamed, f"'{sender}' saw other {what} of {', '.join(differ)} than '{self._name}'")

    def _where(self) -> list[object]:
        return [self.group.run_id, self.group.round, self.group.attempt, list(self.group.members)]

    def _chunk(self, member: str) -> slice:
        """The part of the vector that a member adds up."""
        count, place = len(self.group.members), self.group.members.index(member)
        length = self._form.length
        return slice(place * length // count, (place + 1) * length // count)

    def _chunk_bytes(self, member: str) -> int:
        return len(range(self._form.length)[self._chunk(member)]) * self._form.value_bytes


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
