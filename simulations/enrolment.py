"""The identities of a simulation's sites, made of their names: alike in every process, and no secret to anybody.

A simulation protects no one from whoever runs it. It goes through all of the protocol, for what that costs and whether
the sums are right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.enrolment import Enrolment
from security.secure_aggregation.terms import Minimums
from security.signing import public_key_text

_NO_DEMANDS = Minimums(minimum_sites=2)


def identities_of(sites: Sequence[str]) -> Mapping[str, str]:
    """The public identities of these sites."""
    return {site: public_key_text(_identity(site)) for site in sites}


def enrolments_of(sites: Sequence[str], topology: Literal["federated", "gossip"]) -> dict[str, Enrolment]:
    """Each site's enrolment in runs of this kind: it knows the others, and demands nothing."""
    roster = identities_of(sites)
    return {site: Enrolment(topology, site, _identity(site), roster, _NO_DEMANDS) for site in sites}


def _identity(site: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"simulated site {site}".encode()).digest())
