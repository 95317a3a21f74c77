"""The pairs of sites that mask together: all pairs, or in a large cohort each site and its fifty nearest on a ring.

The ring (a Harary graph; Bell et al. 2020) orders the sites by a hash over the pinned roster: neither the server nor a
round has a say in it, so nobody can draw until a site is surrounded by others of his choice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

from core_training.foundation.errors import ProtocolError
from security import identities

MOST_NEIGHBOURS = 50


def roster_digest(roster: Mapping[str, str]) -> bytes:
    """32 bytes that differ for different rosters (names and public keys)."""
    return bytes.fromhex(identities.roster_digest(roster))


def to_bits(sites: Collection[str], roster: Mapping[str, str]) -> bytes:
    """A set of sites as one bit for each name of the roster in sorted order: it stays small among thousands."""
    chosen = set(sites)
    bits = sum(1 << place for place, name in enumerate(sorted(roster)) if name in chosen)
    return bits.to_bytes((len(roster) + 7) // 8, "little")


def from_bits(bits: bytes, roster: Mapping[str, str]) -> list[str]:
    """The sites, sorted. Raises ProtocolError when `bits` is not what `to_bits` makes with this roster."""
    number = int.from_bytes(bits, "little")
    if len(bits) != (len(roster) + 7) // 8 or number >> len(roster):
        raise ProtocolError(f"a set of sites has one bit for each of the roster's {len(roster)} names")
    return [name for place, name in enumerate(sorted(roster)) if number >> place & 1]


def bits_digest(bits: bytes) -> bytes:
    """32 bytes that differ for different sets of sites."""
    return hashlib.sha256(bits).digest()


class Graph:
    """The graph over the sites of one cohort."""

    def __init__(self, cohort: Collection[str], roster: Mapping[str, str]) -> None:
        digest = roster_digest(roster)
        self._ring = sorted(cohort, key=lambda site: hashlib.sha256(digest + site.encode()).digest())
        self._place = {site: place for place, site in enumerate(self._ring)}
        self._holders: dict[str, list[str]] = {}

    def holders(self, site: str) -> list[str]:
        """The site and its neighbours, sorted: they mask with it, and hold shares of its secrets in this order."""
        if site not in self._holders:
            reach, size, place = MOST_NEIGHBOURS // 2, len(self._ring), self._place[site]
            near = range(size) if size <= MOST_NEIGHBOURS + 1 else range(place - reach, place + reach + 1)
            self._holders[site] = sorted(self._ring[at % size] for at in near)
        return self._holders[site]
