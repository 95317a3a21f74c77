"""Identities: the Ed25519 public keys by which sites know each other, and the digest that people compare by phone.

A site hands its identity over as a line of OpenSSH's form; rosters hold it as `ed25519:…`. Knows no files.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from security.signing import canonical_json

IDENTITY = r"^ed25519:[A-Za-z0-9+/]{43}=$"


def ssh_line(key: Ed25519PrivateKey, name: str) -> str:
    """The public half as a line of OpenSSH's form: `ssh-ed25519 … NAME`."""
    return f"{key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()} {name}"


def identity_in(line: str) -> str:
    """The identity, `ed25519:…`, in a line of OpenSSH's form. Raises ValueError where the line is none."""
    try:
        key = load_ssh_public_key(line.encode())
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from None
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("not a key of the kind ssh-ed25519")
    return "ed25519:" + base64.b64encode(key.public_bytes_raw()).decode()


def is_identity(text: str) -> bool:
    """Whether this is a public key in the one form that it has as text."""
    try:
        raw = base64.b64decode(text.removeprefix("ed25519:"), validate=True)
    except (binascii.Error, ValueError):
        return False
    return len(raw) == 32 and text == "ed25519:" + base64.b64encode(raw).decode()


def roster_digest(identities: Mapping[str, str]) -> str:
    """SHA-256 (hex) of a roster: the same at two parties if, and only if, all names and identities are."""
    return hashlib.sha256(canonical_json(dict(identities))).hexdigest()


def to_read_out(digest: str) -> str:
    """A digest in groups of four, as one reads it out."""
    return " ".join(digest[start : start + 4] for start in range(0, len(digest), 4))
