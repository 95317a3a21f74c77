"""A site's side of secure aggregation for a server: bytes in, bytes out, and a record that outlives the process.

What the site holds to, whatever the server asks:
- keys only from the pinned roster, signed, for this run, batch, roster and terms;
- one dealing of shares for each set of keys, one vector for each slot, one slot for each round, one list of survivors
  for each slot: to the same question the same answer, to another one none;
- a list of survivors parts exactly the participants that it masked with, has itself among the survivors and the signed
  statement of each beside it, and leaves the threshold and the minimum in its neighbourhood;
- a slot's seed is erased when its shares are given, when a later slot is masked, and when new keys are made.

Does not know where the record is kept or how messages travel.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict

from core_training.foundation.errors import InputError, ProtocolError
from security.secure_aggregation.graph import MOST_NEIGHBOURS, Graph, bits_digest, from_bits, roster_digest, to_bits
from security.secure_aggregation.keys import (
    MASK_KEY,
    OWN_MASK,
    SlotSecrets,
    commitment,
    own_mask,
    pad_share,
    pair_mask,
    seal,
    seal_reply,
    unseal,
)
from security.secure_aggregation.masks import RingVector, add_masks, cut
from security.secure_aggregation.messages import (
    AnyMessage,
    Attempt,
    Batch,
    Bytes,
    Bytes32,
    Deal,
    Dealt,
    Keys,
    Masked,
    MaskOrder,
    Message,
    SharesOrder,
    Signed,
    SlotShares,
    Unmasked,
    UnmaskOrder,
    expect,
    open_signed,
    read,
    shares_digest,
    sign,
    survivors_digest,
    vector_digest,
)
from security.secure_aggregation.terms import Minimums, Terms
from security.signing import public_key_text

Given = TypeVar("Given")


class _Dealing(Message):
    """The sites among which this one dealt shares: the cohort, and the keys of its holders in it, itself among them."""

    cohort: Bytes
    keys: dict[str, Keys]


class _Record(BaseModel):
    """All that a restarted site needs. A seed is None once its slot is over."""

    model_config = ConfigDict(extra="forbid", strict=True)

    run: str
    last_round: int = -1
    keys: Keys | None = None
    seeds: list[Bytes32 | None] = []
    dealing: _Dealing | None = None
    masked: Masked | None = None
    unmasked: Unmasked | None = None


class SiteProtocol:
    """One site in one run.

    `roster` is the one that the site pinned: names and public keys (`ed25519:…`), its own among them. `record` is what
    an earlier process left; write `record` to disk after each answer, before the answer leaves. Every method raises
    ProtocolError, with nothing changed, when the server asks for what a site does not give. The constructor raises
    InputError when the terms are below the site's minimums, or roster or record are not this site's and run's.
    """

    def __init__(
        self,
        name: str,
        identity: Ed25519PrivateKey,
        roster: Mapping[str, str],
        terms: Terms,
        minimums: Minimums,
        run_id: str,
        *,
        record: dict[str, Any] | None = None,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        minimums.check(terms)
        # The others would refuse this site's signatures, and take those of another key for its own.
        if roster.get(name) != public_key_text(identity):
            raise InputError(f"roster: it has no site '{name}' with this site's own key; pin the roster that has it")
        self.name = name
        self._identity = identity
        self._roster = roster
        self._terms = terms
        self._minimums = minimums
        self._random = random
        self._record = _Record.model_validate(record or {"run": run_id})
        if self._record.run != run_id:
            raise InputError(f"run '{run_id}': this record of secure aggregation is of run '{self._record.run}'")

    @property
    def record(self) -> dict[str, Any]:
        """The record that has to be on disk before an answer leaves: a JSON document with secrets in it."""
        return self._record.model_dump(mode="json")

    def erase(self) -> None:
        """Forget every secret; what remains keeps a round from being masked twice. For the end of the run."""
        self._record = _Record(run=self._record.run, last_round=self._record.last_round)

    def answer(self, step: str, order: bytes) -> bytes:
        """Answer the server's order of the step "keys", "shares" or "unmask"."""
        return {"keys": self._make_keys, "shares": self._deal_shares, "unmask": self._unmask}[step](order).to_json()

    def mask(self, round: int, order: str, context: bytes, vector: RingVector) -> str:
        """Mask the vector of this round in place; return the signed statement that goes with it.

        `context` is 32 bytes, a digest of all that is public about the round. On ProtocolError nothing was masked, or
        the vector is zero: a second vector under the same mask would give away how it differs from the first.
        """
        own, dealing = self._standing()
        asked = read(MaskOrder, order, "order to mask", 0, MOST_NEIGHBOURS)
        slot = asked.attempt.slot
        attempt = Attempt(run=own.batch.run, batch=own.batch.number, slot=slot, round=round)
        # The round is the caller's: no order can have this vector masked as another round's.
        expect(asked, "order to mask", attempt=attempt)
        masking = self._check_participants(asked)
        before = self._record.masked
        again = before is not None and before.attempt == attempt
        # Two sums of one round, with a site and without it, would differ by its vector.
        if not again and round <= self._record.last_round:
            raise ProtocolError(f"round {round}: this site masked round {self._record.last_round}, and none twice")
        if not again and before is not None and slot <= before.attempt.slot:
            raise ProtocolError(f"slot {slot}: this site masked slot {before.attempt.slot}, and none twice")
        secrets, place = self._secrets(slot), own.batch.place(slot)
        added, subtracted = [own_mask(secrets.own_mask, place, self.name, round, context)], list[bytes]()
        for other in masking:
            if other != self.name:
                theirs = dealing.keys[other].mask[slot]
                key = pair_mask(secrets.mask_key, theirs, place, (self.name, other), round, context)
                (subtracted if self.name > other else added).append(key)
        add_masks(vector, added, subtracted)
        cut(vector, self._terms.ring_bits)
        statement = Masked(
            site=self.name,
            attempt=attempt,
            keys=own.digest(),
            participants=bits_digest(asked.participants),
            context=context,
            vector=vector_digest(vector),
        )
        if again and statement != before:
            vector.fill(0)
            raise ProtocolError(f"slot {slot}: this site masked another vector, or among other sites, before")
        seeds = [None if earlier < slot else seed for earlier, seed in enumerate(self._record.seeds)]
        self._note(last_round=round, seeds=seeds, masked=statement, unmasked=None)
        return sign(statement, self._identity).to_json().decode()

    def _make_keys(self, order: bytes) -> Message:
        batch = read(Batch, order, "order for keys", 0, 0)
        digests = {"roster": roster_digest(self._roster), "terms": self._terms.digest()}
        expect(batch, "order for keys", run=self._record.run, **digests)
        seeds = [self._random(32) for _ in range(batch.slots)]
        secrets = [SlotSecrets(seed) for seed in seeds]
        keys = Keys(
            site=self.name,
            batch=batch,
            mask=[slot.mask_key.public_key().public_bytes_raw() for slot in secrets],
            seal=[slot.seal_key.public_key().public_bytes_raw() for slot in secrets],
        )
        # The last round outlives new keys, or the next batch could have an old round masked again.
        self._record = _Record(run=batch.run, last_round=self._record.last_round, keys=keys, seeds=list(seeds))
        return sign(keys, self._identity)

    def _deal_shares(self, order: bytes) -> Message:
        own = self._own_keys()
        asked = read(SharesOrder, order, "order for shares", own.batch.slots, MOST_NEIGHBOURS)
        expect(asked, "order for shares", batch=own.batch)
        cohort = from_bits(asked.cohort, self._roster)
        if self.name not in cohort:
            raise ProtocolError("order for shares: this site is not in the cohort")
        holders = Graph(cohort, self._roster).holders(self.name)
        self._check_enough(holders, holders)
        threshold = self._minimums.check_threshold(self._terms, len(holders))
        keys = {
            holder: self._open(Keys, signed, holder, batch=own.batch)
            for holder, signed in _pairs(holders, asked.keys, "order for shares")
        }
        # With older keys the others would seal and mask for seeds that this site has erased.
        if keys[self.name] != own:
            raise ProtocolError("order for shares: the keys of this site in it are not its latest")
        dealing = _Dealing(cohort=asked.cohort, keys=keys)
        # Dealt twice, the same secrets would have more holders than the threshold reckons with.
        if self._record.dealing not in (None, dealing):
            raise ProtocolError(
                f"batch {own.batch.number}: this site dealt its shares among others, and deals none twice"
            )
        slots = [self._slot_shares(slot, threshold, keys) for slot in range(own.batch.slots)]
        dealt = Dealt(
            site=self.name,
            batch=own.batch,
            cohort=bits_digest(asked.cohort),
            keys=own.digest(),
            shares=shares_digest(slots),
        )
        self._note(dealing=dealing)
        return Deal(dealt=sign(dealt, self._identity), slots=slots)

    def _slot_shares(self, slot: int, threshold: int, keys: dict[str, Keys]) -> SlotShares:
        secrets = self._secrets(slot)
        shares = secrets.shares(threshold, len(keys))
        place = keys[self.name].batch.place(slot)
        return SlotShares(
            own_mask=commitment(secrets.own_mask),
            commitments=[commitment(part[MASK_KEY]) + commitment(part[OWN_MASK]) for part in shares],
            sealed=[
                seal(secrets.seal_key, keys[holder].seal[slot], place, self.name, holder, share)
                for holder, share in zip(keys, shares, strict=True)
            ],
        )

    def _unmask(self, order: bytes) -> Message:
        own, dealing = self._standing()
        masked = self._record.masked
        if masked is None:
            raise ProtocolError("order to unmask: this site has masked nothing with its latest keys")
        asked = read(UnmaskOrder, order, "order to unmask", 0, MOST_NEIGHBOURS)
        expect(asked, "order to unmask", attempt=masked.attempt)
        survivors, dropped = from_bits(asked.survivors, self._roster), from_bits(asked.dropped, self._roster)
        participants = {*survivors, *dropped}
        # Of a site in both lists both secrets would be opened, and so its vector.
        if set(survivors) & set(dropped) or bits_digest(to_bits(participants, self._roster)) != masked.participants:
            raise ProtocolError("order to unmask: survivors and dropped are not, each once, those who were to mask")
        if self.name not in survivors:
            raise ProtocolError("order to unmask: this site masked its vector, and is not among the survivors")
        masking = [holder for holder in dealing.keys if holder in participants]
        surviving = [holder for holder in masking if holder in survivors]
        self._check_enough(surviving, dealing.keys)
        for site, signed in _pairs(surviving, asked.masked, "order to unmask"):
            alike = {"attempt": masked.attempt, "participants": masked.participants, "context": masked.context}
            # Each survivor signed that it masked in this very attempt, so the server cannot make any up.
            self._open(Masked, signed, site, keys=dealing.keys[site].digest(), **alike)
        listed = survivors_digest(masked.attempt, masked.context, masked.participants, asked.survivors)
        if (before := self._record.unmasked) is not None:
            # A site may be a survivor in one list and dropped in the other: both its secrets would be opened.
            if before.survivors != listed:
                raise ProtocolError("order to unmask: this site unmasked for other survivors, and does so only once")
            return sign(before, self._identity)
        slot = masked.attempt.slot
        secrets, place = self._secrets(slot), own.batch.place(slot)
        pads, given = [], b""
        for dealer, sealed in _pairs(masking, asked.sealed, "order to unmask"):
            shares = unseal(secrets.seal_key, dealing.keys[dealer].seal[slot], place, dealer, self.name, sealed)
            # One of the two and never both: with both the dealer's vector is open.
            given += shares[OWN_MASK] if dealer in surviving else shares[MASK_KEY]
            if dealer in surviving:
                pads.append(pad_share(shares, listed))
        reply = Unmasked(
            site=self.name,
            attempt=masked.attempt,
            survivors=listed,
            pads=pads,
            sealed=seal_reply(secrets.pad(listed), given),
        )
        seeds = [None if over == slot else seed for over, seed in enumerate(self._record.seeds)]
        self._note(unmasked=reply, seeds=seeds)
        return sign(reply, self._identity)

    def _check_participants(self, asked: MaskOrder) -> list[str]:
        """The sites that mask with this one, itself among them; each dealt shares in its cohort with known keys."""
        own, dealing = self._standing()
        participants = from_bits(asked.participants, self._roster)
        if self.name not in participants or not set(participants) <= set(from_bits(dealing.cohort, self._roster)):
            raise ProtocolError("order to mask: the participants are not this site and others of its cohort")
        masking = [holder for holder in dealing.keys if holder in participants]
        self._check_enough(masking, dealing.keys)
        cohort = bits_digest(dealing.cohort)
        for site, signed in _pairs(masking, asked.dealt, "order to mask"):
            # Who dealt in another cohort has other holders, whose number this site has not checked.
            self._open(Dealt, signed, site, batch=own.batch, cohort=cohort, keys=dealing.keys[site].digest())
        return masking

    def _check_enough(self, there: Collection[str], holders: Collection[str]) -> None:
        """Check threshold and minimum in the neighbourhood, where this site can see for itself who is there."""
        needed = max(self._terms.threshold_of(len(holders)), self._terms.minimum_sites)
        if len(there) < needed:
            raise ProtocolError(f"{len(there)} sites in the neighbourhood of {self.name}: it takes {needed} or more")

    def _open(self, model: type[AnyMessage], signed: Signed, site: str, **wanted: object) -> AnyMessage:
        message = open_signed(model, signed, site, self._roster[site])
        expect(message, f"{model.__name__.lower()} of {site}", site=site, **wanted)
        return message

    def _own_keys(self) -> Keys:
        if self._record.keys is None:
            raise ProtocolError("this site has made no keys in this run yet: ask for keys first")
        return self._record.keys

    def _standing(self) -> tuple[Keys, _Dealing]:
        if self._record.dealing is None:
            raise ProtocolError("this site has dealt no shares with its latest keys: ask for shares first")
        return self._own_keys(), self._record.dealing

    def _secrets(self, slot: int) -> SlotSecrets:
        seed = self._record.seeds[slot] if slot < len(self._record.seeds) else None
        if seed is None:
            raise ProtocolError(f"slot {slot}: it is over, or not of this batch")
        return SlotSecrets(seed)

    def _note(self, **changes: object) -> None:
        self._record = self._record.model_copy(update=changes)


def _pairs(sites: Sequence[str], given: Sequence[Given], source: str) -> list[tuple[str, Given]]:
    if len(sites) != len(given):
        raise ProtocolError(f"{source}: it has {len(given)} parts for this site's {len(sites)} holders")
    return list(zip(sites, given, strict=True))
