"""Signed documents: Ed25519 over canonical JSON. Knows keys and bytes, not what a document says."""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from core_training.foundation.errors import InputError
from security.private_files import make_private_folder, read_private_file, write_private_file

_PREFIX = "ed25519:"


def canonical_json(document: Any) -> bytes:
    """The one byte form of a JSON document: sorted keys, no spaces, UTF-8, no NaN."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def create_signing_key(path: Path) -> Ed25519PrivateKey:
    """Make a signing key in a new file that only its owner may read."""
    key = Ed25519PrivateKey.generate()
    make_private_folder(path.parent)
    write_private_file(
        path,
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    return key


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    """Read what `create_signing_key` wrote. Raises InputError on anything else."""
    data = read_private_file(path)
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path}: this is not an Ed25519 private key in PEM")
    return key


def public_key_text(key: Ed25519PrivateKey) -> str:
    """The public half as people hand it over: `ed25519:` and 44 characters of base64."""
    return _PREFIX + base64.b64encode(key.public_key().public_bytes_raw()).decode()


def sign_document(document: dict[str, Any], key: Ed25519PrivateKey) -> dict[str, Any]:
    """The document together with the signature over its canonical form."""
    signature = key.sign(canonical_json(document))
    return {"document": document, "signature": base64.b64encode(signature).decode()}


def open_signed_document(signed: Any, public_key: str, source: str) -> dict[str, Any]:
    """The document inside `signed`, if the holder of `public_key` signed it; `source` names it in errors.

    Raises InputError when the form, the key or the signature is wrong.
    """
    if not isinstance(signed, dict) or signed.keys() != {"document", "signature"}:
        raise InputError(f"{source}: a signed document holds 'document' and 'signature', nothing else")
    document, signature = signed["document"], signed["signature"]
    if not isinstance(document, dict) or not isinstance(signature, str):
        raise InputError(f"{source}: 'document' must be a mapping and 'signature' a string")
    try:
        _public_key(public_key).verify(base64.b64decode(signature, validate=True), canonical_json(document))
    except (InvalidSignature, binascii.Error, ValueError):
        raise InputError(
            f"{source}: the signature does not match the content and the key {public_key}; "
            "the file was changed, or another founder signed it"
        ) from None
    return document


def _public_key(text: str) -> Ed25519PublicKey:
    try:
        return Ed25519PublicKey.from_public_bytes(base64.b64decode(text.removeprefix(_PREFIX), validate=True))
    except (binascii.Error, ValueError):
        raise InputError(f"'{text}': a public key is '{_PREFIX}' and 44 characters of base64") from None
