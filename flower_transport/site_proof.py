"""The proof of an admitted site in the headers of a call, checked before the call's body is read.

Flower signs each call of a site with the site's key, and checks that only once the whole body lies in memory.
"""

from __future__ import annotations

import hashlib
from base64 import b64decode
from datetime import datetime
from typing import Protocol

from cryptography.exceptions import UnsupportedAlgorithm
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from starlette.datastructures import Headers


class KnownKeys(Protocol):
    """Flower's record of the sites' public keys."""

    def get_node_id_by_public_key(self, public_key: bytes) -> int | None: ...


def proven_site(headers: Headers, known: KnownKeys) -> str | None:
    """The digest (hex) of the key of the admitted site that signed these headers; None when no such site did."""
    try:
        public_key = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
        if known.get_node_id_by_public_key(public_key) is None or not _is_signed(headers, public_key):
            return None
    except (KeyError, ValueError, TypeError, UnsupportedAlgorithm):
        return None
    return hashlib.sha256(public_key).hexdigest()


def _is_signed(headers: Headers, public_key: bytes) -> bool:
    signed = headers[TIMESTAMP_HEADER]
    age = (now() - datetime.fromisoformat(signed)).total_seconds()
    if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
        return False
    signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
    return bool(verify_signature(bytes_to_public_key(public_key), signed.encode("ascii"), signature))
