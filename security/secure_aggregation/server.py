"""The server's side of secure aggregation: bytes in, bytes out, one running sum.

`ServerBatch` sets up many slots ahead of time, `ServerRound` spends one of them on an attempt at a round. Every message
of a site is checked before it counts, and what is opened in the end is checked against what its owner committed to: the
sum is exact, or there is none. Does not know how messages travel, nor what the vectors mean.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import BaseModel, ConfigDict

from core_training.foundation.errors import ProtocolError
from security.secure_aggregation.graph import MOST_NEIGHBOURS, Graph, bits_digest, roster_digest, to_bits
from security.secure_aggregation.keys import SHARE_BYTES, commitment, open_reply, own_mask, pair_mask
from security.secure_aggregation.masks import RingVector, add_masks, cut, pair_key, zeros
from security.secure_aggregation.messages import (
    Attempt,
    Batch,
    Deal,
    Dealt,
    Keys,
    Masked,
    MaskOrder,
    SharesOrder,
    Signed,
    Unmasked,
    UnmaskOrder,
    expect,
    open_signed,
    read,
    shares_digest,
    survivors_digest,
    vector_digest,
)
from security.secure_aggregation.shamir import join
from security.secure_aggregation.terms import Terms


class _Record(BaseModel):
    """The sites' messages of the set-up; all of it public, or sealed to other sites."""

    model_config = ConfigDict(extra="forbid", strict=True)

    keys: dict[str, Signed] = {}
    cohort: list[str] = []
    deals: dict[str, Deal] = {}


class ServerBatch:
    """The set-up of `slots` attempts. `number` must be another for every batch of a run.

    `record` is what an earlier process left: with it the same slot can be asked for again. Every method raises
    ProtocolError, with nothing changed, for an answer that it refuses.
    """

    def __init__(
        self,
        run_id: str,
        number: int,
        slots: int,
        roster: Mapping[str, str],
        terms: Terms,
        record: dict[str, Any] | None = None,
    ) -> None:
        self.roster = roster
        self.terms = terms
        self.batch = Batch(run=run_id, number=number, slots=slots, roster=roster_digest(roster), terms=terms.digest())
        self._record = _Record.model_validate(record or {})
        self.keys = {site: self._open_keys(site, signed) for site, signed in self._record.keys.items()}
        self.graph = Graph(self._record.cohort, roster)

    @property
    def record(self) -> dict[str, Any]:
        """A JSON document for a server that wants to go on with this batch after a restart."""
        return self._record.model_dump(mode="json")

    @property
    def deals(self) -> Mapping[str, Deal]:
        """Each site's deal."""
        return self._record.deals

    @property
    def sites(self) -> list[str]:
        """The sites that dealt shares: they can take part in this batch's rounds."""
        return sorted(self._record.deals)

    def keys_order(self) -> bytes:
        """The order for keys, the same for every site."""
        return self.batch.to_json()

    def add_keys(self, site: str, answer: bytes) -> None:
        """Take a site's keys."""
        if site not in self.roster:
            raise ProtocolError(f"keys of {site}: the roster has no such site")
        # Every site signs the cohort when it deals: a later member would be in no signature.
        if self._record.cohort or site in self.keys:
            raise ProtocolError(f"keys of {site}: they came twice, or after the cohort was fixed")
        signed = read(Signed, answer, f"keys of {site}", self.batch.slots, 1)
        keys = self._open_keys(site, signed)
        for public in keys.mask + keys.seal:
            pair_key(X25519PrivateKey.generate(), public, b"", b"")  # refuses points that every site would stumble over
        self._record.keys[site] = signed
        self.keys[site] = keys

    def shares_orders(self) -> dict[str, bytes]:
        """The orders for shares. The first call fixes the cohort: the sites whose keys are here."""
        cohort = self._record.cohort or sorted(self.keys)
        graph = Graph(cohort, self.roster)
        fewest = min((len(graph.holders(site)) for site in cohort), default=0)
        # Before the cohort is fixed: after the error more keys may still come.
        self.check_enough(fewest, fewest)
        self._record.cohort, self.graph = cohort, graph
        bits = to_bits(cohort, self.roster)
        orders = {}
        for site in cohort:
            keys = [self._record.keys[holder] for holder in graph.holders(site)]
            orders[site] = SharesOrder(batch=self.batch, cohort=bits, keys=keys).to_json()
        return orders

    def add_shares(self, site: str, answer: bytes) -> None:
        """Take what a site dealt. It takes part in the rounds that begin after that."""
        if site not in self._record.cohort or site in self.deals:
            raise ProtocolError(f"shares of {site}: they came twice, or the site is not in the cohort")
        holders = self.graph.holders(site)
        deal = read(Deal, answer, f"shares of {site}", self.batch.slots, len(holders))
        dealt = open_signed(Dealt, deal.dealt, site, self.roster[site])
        cohort = bits_digest(to_bits(self._record.cohort, self.roster))
        expect(dealt, f"shares of {site}", site=site, batch=self.batch, cohort=cohort, keys=self.keys[site].digest())
        # The site signed a digest: the shares beside it must be those.
        expect(dealt, f"shares of {site}", shares=shares_digest(deal.slots))
        whole = all(len(slot.commitments) == len(slot.sealed) == len(holders) for slot in deal.slots)
        if len(deal.slots) != self.batch.slots or not whole:
            raise ProtocolError(f"shares of {site}: {self.batch.slots} slots need a share for each of {len(holders)}")
        self._record.deals[site] = deal

    def check_enough(self, there: int, holders: int) -> int:
        """The threshold among `holders`; raises ProtocolError when those `there` are below it or the minimum."""
        threshold = self.terms.threshold_of(holders)
        if there < (needed := max(threshold, self.terms.minimum_sites)):
            raise ProtocolError(f"{there} of {holders} sites are there; it takes {needed}")
        return threshold

    def check_together(self, sites: Collection[str]) -> None:
        """Raise ProtocolError unless every one of the sites has enough of them in its neighbourhood."""
        there = set(sites)
        for site in there:
            holders = self.graph.holders(site)
            self.check_enough(len(there.intersection(holders)), len(holders))
        if not there:
            raise ProtocolError("no site is there")

    def _open_keys(self, site: str, signed: Signed) -> Keys:
        keys = open_signed(Keys, signed, site, self.roster[site])
        expect(keys, f"keys of {site}", site=site, batch=self.batch)
        return keys


class ServerRound:
    """One attempt at a round, with a slot of a batch that no other attempt had.

    `context` is 32 bytes, a digest of all that is public about the round, `length` the vectors' length, `sites` those
    that are asked; who dealt no shares in this batch is left out. Raises ProtocolError, here as in every method with
    nothing changed, when a message is refused or too few sites are left.
    """

    def __init__(
        self, batch: ServerBatch, slot: int, round: int, context: bytes, length: int, sites: Collection[str]
    ) -> None:
        self.participants = sorted(set(sites) & set(batch.sites))
        self._asked = frozenset(self.participants)
        self._bits = to_bits(self._asked, batch.roster)
        self._batch = batch
        self._slot = slot
        self._context = context
        self._attempt = Attempt(run=batch.batch.run, batch=batch.batch.number, slot=slot, round=round)
        self._masked: dict[str, Signed] = {}
        self._replies: dict[str, Unmasked] = {}
        self._listed: bytes | None = None  # the digest of the list of survivors, once it is fixed
        self._opened = False
        self._sum = zeros(length, batch.terms.ring_bits)
        batch.check_together(self.participants)

    @property
    def survivors(self) -> list[str]:
        """The sites whose vectors are in the sum."""
        return sorted(self._masked)

    def mask_order(self, site: str) -> str:
        """The order that the site's `SiteProtocol.mask` takes."""
        if site not in self._asked:
            raise ProtocolError(f"{site}: it dealt no shares in this batch, or is not asked in this round")
        dealt = [self._batch.deals[holder].dealt for holder in self._near(site)]
        return MaskOrder(attempt=self._attempt, participants=self._bits, dealt=dealt).to_json().decode()

    def add(self, site: str, statement: str, vector: RingVector) -> None:
        """Add a site's masked vector to the sum."""
        source = f"masked vector of {site}"
        # Once the list is fixed, nobody would open the mask of one more vector.
        if site not in self._asked or site in self._masked or self._listed:
            raise ProtocolError(f"{source}: it came twice or too late, or the site is not asked in this round")
        if (vector.dtype, vector.shape) != (self._sum.dtype, self._sum.shape):
            raise ProtocolError(f"{source}: {vector.dtype} {vector.shape}, not {self._sum.dtype} {self._sum.shape}")
        signed = read(Signed, statement, source, 0, 1)
        masked = open_signed(Masked, signed, site, self._batch.roster[site])
        expect(
            masked,
            source,
            site=site,
            attempt=self._attempt,
            keys=self._batch.keys[site].digest(),
            participants=bits_digest(self._bits),
            context=self._context,
            vector=vector_digest(vector),
        )
        self._sum += vector
        self._masked[site] = signed

    def unmask_orders(self) -> dict[str, bytes]:
        """The orders to unmask, for the survivors. From here on no vector is taken."""
        self._batch.check_together(self.survivors)
        survivors = to_bits(self._masked, self._batch.roster)
        dropped = to_bits(self._asked - set(self._masked), self._batch.roster)
        # Fixed before an order leaves: a site answers for one list only.
        self._listed = survivors_digest(self._attempt, self._context, bits_digest(self._bits), survivors)
        orders = {}
        for site in self.survivors:
            sealed = []
            for dealer in self._near(site):
                place = self._holders(dealer).index(site)
                sealed.append(self._batch.deals[dealer].slots[self._slot].sealed[place])
            orders[site] = UnmaskOrder(
                attempt=self._attempt,
                survivors=survivors,
                dropped=dropped,
                masked=[self._masked[near] for near in self._surviving(site)],
                sealed=sealed,
            ).to_json()
        return orders

    def add_unmasked(self, site: str, answer: bytes) -> None:
        """Take a survivor's reply."""
        source = f"unmasked of {site}"
        if site not in self._masked or site in self._replies or not self._listed:
            raise ProtocolError(f"{source}: it came twice or too early, or the site is not among the survivors")
        signed = read(Signed, answer, source, 0, MOST_NEIGHBOURS)
        reply = open_signed(Unmasked, signed, site, self._batch.roster[site])
        expect(reply, source, site=site, attempt=self._attempt, survivors=self._listed)
        if len(reply.pads) != (pads := len(self._surviving(site))):
            raise ProtocolError(f"{source}: {len(reply.pads)} shares of pads for {pads} survivors")
        self._replies[site] = reply

    def finish(self) -> RingVector:
        """The sum of the survivors' vectors, without any mask. More replies may come after a ProtocolError."""
        # The masks are taken out in place, and must not be taken out twice.
        if self._opened:
            return self._sum
        shares, faults = self._open_replies()
        secrets = {}
        for dealer in self.participants:
            # A site that dropped out with all its neighbours left no mask in any vector.
            if dealer in self._masked or self._surviving(dealer):
                secrets[dealer] = self._join(dealer, shares[dealer], faults)
        place = self._batch.batch.place(self._slot)
        added, subtracted = list[bytes](), list[bytes]()
        for dealer, secret in secrets.items():
            if dealer in self._masked:
                key = own_mask(secret, place, dealer, self._attempt.round, self._context)
                subtracted.append(key)
                continue
            private = X25519PrivateKey.from_private_bytes(secret)
            for other in self._surviving(dealer):
                public = self._batch.keys[other].mask[self._slot]
                key = pair_mask(private, public, place, (dealer, other), self._attempt.round, self._context)
                # The survivor added this mask if its name is the lower one: here it goes the other way.
                (subtracted if other < dealer else added).append(key)
        add_masks(self._sum, added, subtracted)
        cut(self._sum, self._batch.terms.ring_bits)
        self._opened = True
        return self._sum

    def _open_replies(self) -> tuple[dict[str, dict[int, int]], list[str]]:
        """Shares by dealer and holder's number, as far as they fit their commitments; and what did not fit."""
        shares: dict[str, dict[int, int]] = {dealer: {} for dealer in self.participants}
        faults = []
        for holder, reply in self._replies.items():
            pads = {}
            for number, other in enumerate(self._holders(holder), 1):
                if other in self._replies:
                    place = self._surviving(other).index(holder)
                    pads[number] = int.from_bytes(self._replies[other].pads[place])
            threshold = self._threshold(holder)
            # No fault: replies that are still to come may open it.
            if len(pads) < threshold:
                continue
            given = _opened(reply.sealed, pads, threshold)
            if given is None:
                faults.append(f"; the reply of {holder} does not open")
                continue
            for place, dealer in enumerate(self._near(holder)):
                share = given[place * SHARE_BYTES : (place + 1) * SHARE_BYTES]
                at = self._holders(dealer).index(holder)
                commitments = self._batch.deals[dealer].slots[self._slot].commitments[at]
                # One by one: a single wrong share would spoil the secret and not show whose it is.
                if commitment(share) == (commitments[32:] if dealer in self._masked else commitments[:32]):
                    shares[dealer][at + 1] = int.from_bytes(share)
                else:
                    faults.append(f"; {holder} gave a wrong share of {dealer}")
        return shares, faults

    def _join(self, dealer: str, shares: dict[int, int], faults: list[str]) -> bytes:
        """The dealer's own mask if it survived, else its private mask key, checked against what it signed."""
        threshold = self._threshold(dealer)
        if len(shares) < threshold:
            opened = f"{len(shares)} shares of what {dealer} dealt can be opened; it takes {threshold}"
            raise ProtocolError(opened + "".join(faults))
        value = join(dict(list(shares.items())[:threshold]))
        secret = value.to_bytes(SHARE_BYTES)[1:]
        if dealer in self._masked:
            fits = commitment(secret) == self._batch.deals[dealer].slots[self._slot].own_mask
        else:
            public = X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
            fits = public == self._batch.keys[dealer].mask[self._slot]
        if not fits:
            raise ProtocolError(f"the shares that {dealer} dealt do not give the secret that it signed")
        return secret

    def _holders(self, site: str) -> list[str]:
        return self._batch.graph.holders(site)

    def _near(self, site: str) -> list[str]:
        """The participants in the site's neighbourhood, itself among them; `_surviving` the survivors."""
        return [holder for holder in self._holders(site) if holder in self._asked]

    def _surviving(self, site: str) -> list[str]:
        return [holder for holder in self._holders(site) if holder in self._masked]

    def _threshold(self, site: str) -> int:
        return self._batch.terms.threshold_of(len(self._holders(site)))


def _opened(sealed: bytes, pads: Mapping[int, int], threshold: int) -> bytes | None:
    """A reply, by shares of its pad. Nobody signed for these: one false one is found by leaving out each in turn."""
    for left_out in (None, *pads):
        chosen = {number: share for number, share in pads.items() if number != left_out}
        if len(chosen) >= threshold:
            with suppress(ProtocolError):
                return open_reply(join(dict(list(chosen.items())[:threshold])), sealed)
    return None
