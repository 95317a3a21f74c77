"""A whole federation in one process: real sites, a real server, and randomness that a test can repeat."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import cache

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from security.secure_aggregation.masks import RingVector
from security.secure_aggregation.server import ServerBatch, ServerRound
from security.secure_aggregation.site import SiteProtocol
from security.secure_aggregation.terms import Minimums, Terms
from security.signing import public_key_text

RUN = "run-of-a-test"
CONTEXT = bytes(range(32))
DEFAULT = Terms(threshold=None, minimum_sites=3, ring_bits=16, clip=1.0)


@cache
def identity(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(name.encode().ljust(32, b"."))


def roster_of(names: Collection[str]) -> dict[str, str]:
    return {name: public_key_text(identity(name)) for name in names}


class Federation:
    """`count` sites; `seed` fixes all that they draw, `other_seeds` what single sites draw instead."""

    def __init__(
        self,
        count: int,
        terms: Terms = DEFAULT,
        minimums: Minimums | None = None,
        seed: int = 0,
        other_seeds: Mapping[str, int] | None = None,
    ) -> None:
        self.names = [f"site-{number:02d}" for number in range(count)]
        self.roster = roster_of(self.names)
        self.terms = terms
        self.minimums = minimums or Minimums(minimum_sites=2)
        self._draws = {
            name: np.random.default_rng([(other_seeds or {}).get(name, seed), place])
            for place, name in enumerate(self.names)
        }
        self.sites = {name: self.new_site(name) for name in self.names}
        self.batch: ServerBatch
        self.view: list[bytes] = []  # every byte that the server received

    def new_site(self, name: str, record: dict[str, object] | None = None) -> SiteProtocol:
        draw = self._draws[name].bytes
        return SiteProtocol(
            name, identity(name), self.roster, self.terms, self.minimums, RUN, record=record, random=draw
        )

    def restart(self, name: str) -> None:
        """The process is gone; what it wrote to its disk is read by a new one."""
        self.sites[name] = self.new_site(name, json.loads(json.dumps(self.sites[name].record)))

    def answer(self, name: str, step: str, order: bytes) -> bytes:
        answer = self.sites[name].answer(step, order)
        self.view.append(answer)
        return answer

    def set_up(
        self, slots: int = 1, number: int = 0, no_keys: Collection[str] = (), no_shares: Collection[str] = ()
    ) -> ServerBatch:
        """Both set-up exchanges, in which some sites do not answer."""
        batch = ServerBatch(RUN, number, slots, self.roster, self.terms)
        for name in self.names:
            if name not in no_keys:
                batch.add_keys(name, self.answer(name, "keys", batch.keys_order()))
        for name, order in batch.shares_orders().items():
            if name not in no_shares:
                batch.add_shares(name, self.answer(name, "shares", order))
        self.batch = batch
        return batch

    def begin(self, slot: int = 0, round: int = 1, length: int = 8, context: bytes = CONTEXT) -> ServerRound:
        return ServerRound(self.batch, slot, round, context, length, self.names)

    def mask(
        self, opened: ServerRound, name: str, vector: RingVector, round: int = 1, context: bytes = CONTEXT
    ) -> tuple[str, RingVector]:
        """One site's statement and masked vector; the vector given stays as it is."""
        masked = vector.copy()
        statement = self.sites[name].mask(round, opened.mask_order(name), context, masked)
        self.view += [statement.encode(), masked.tobytes()]
        return statement, masked

    def run_round(
        self,
        vectors: Mapping[str, RingVector],
        slot: int = 0,
        round: int = 1,
        no_vector: Collection[str] = (),
        no_unmask: Collection[str] = (),
    ) -> tuple[ServerRound, RingVector]:
        """One whole round in which some sites never mask, and some never unmask."""
        opened = self.begin(slot, round, len(next(iter(vectors.values()))))
        for name in opened.participants:
            if name not in no_vector:
                opened.add(name, *self.mask(opened, name, vectors[name], round))
        for name, order in opened.unmask_orders().items():
            if name not in no_unmask:
                opened.add_unmasked(name, self.answer(name, "unmask", order))
        return opened, opened.finish()

    def vectors(self, length: int = 8, seed: int = 0) -> dict[str, RingVector]:
        """A weighted vector for each site: values times weight, and the weight behind them, in the ring."""
        draw = np.random.default_rng(seed)
        dtype = np.uint16 if self.terms.ring_bits == 16 else np.uint32
        vectors = {}
        for name in self.names:
            weight = int(draw.integers(1, 50))
            values = draw.integers(-100, 101, length - 1) * weight
            ring = (1 << self.terms.ring_bits) - 1
            vectors[name] = (np.append(values, weight) & ring).astype(dtype)
        return vectors

    def plain_sum(self, vectors: Mapping[str, RingVector], names: Collection[str]) -> RingVector:
        """The sum as Python's own integers have it."""
        ring = 1 << self.terms.ring_bits
        columns = zip(*(vectors[name].tolist() for name in names), strict=True)
        return np.array([sum(column) % ring for column in columns], next(iter(vectors.values())).dtype)
