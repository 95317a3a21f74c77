"""Masks: a key that two sites agree on, and the AES-256-CTR stream that it adds to a vector of ring values.

Ring arithmetic is that of numpy's unsigned integers, which wraps modulo 2^16 or 2^32. Knows nothing of who masks what.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from core_training.foundation.errors import ProtocolError

RingVector = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

_BLOCK = 16  # bytes of one AES block
_CHUNK = 1 << 18  # bytes of stream made at a time: it stays in the processor's cache until it is added
_ZEROS = bytes(_CHUNK)
_CORES = len(os.sched_getaffinity(0))


def pair_key(own: X25519PrivateKey, other: bytes, salt: bytes, info: bytes) -> bytes:
    """The 32 bytes that two sites derive from each one's private and the other's public X25519 key (RFC 7748, 5869).

    Raises ProtocolError when `other` is no public key, or one that gives everybody the same secret.
    """
    try:
        secret = own.exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError:
        raise ProtocolError("an X25519 public key is 32 bytes and not a point of small order; refused") from None
    return derive_key(secret, salt, info)


def derive_key(secret: bytes, salt: bytes, info: bytes, length: int = 32) -> bytes:
    """`length` bytes by HKDF-SHA256 (RFC 5869)."""
    return HKDF(SHA256(), length, salt, info).derive(secret)


def add_masks(vector: RingVector, added: Sequence[bytes], subtracted: Sequence[bytes] = (), start: int = 0) -> None:
    """Add the streams of some keys to a contiguous `vector`, and subtract those of others, in place.

    A stream is AES-256-CTR from counter 0, cut into little-endian values of the vector's width; `vector[0]` takes the
    value number `start`. The counter needs no nonce because a key makes one stream and no more. A chunk takes all
    streams while it is in the processor's cache, and each core has a part of the vector.
    """
    step = _CHUNK // vector.itemsize
    share = step * (len(vector) // (step * _CORES) + 1)
    with ThreadPoolExecutor(_CORES) as cores:
        parts = range(0, len(vector), share)
        list(cores.map(lambda at: _add_to_part(vector[at : at + share], added, subtracted, start + at), parts))


def _add_to_part(part: RingVector, added: Sequence[bytes], subtracted: Sequence[bytes], start: int) -> None:
    block, skipped = divmod(start * part.itemsize, _BLOCK)
    streams = [Cipher(AES256(key), CTR(block.to_bytes(_BLOCK, "big"))).encryptor() for key in (*added, *subtracted)]
    combines = [np.add] * len(added) + [np.subtract] * len(subtracted)
    for stream in streams:
        stream.update(bytes(skipped))
    little = part.dtype.newbyteorder("<")
    buffer = bytearray(_CHUNK + _BLOCK - 1)
    step = _CHUNK // part.itemsize
    for first in range(0, len(part), step):
        chunk = part[first : first + step]
        for stream, combine in zip(streams, combines, strict=True):
            stream.update_into(memoryview(_ZEROS)[: chunk.nbytes], buffer)
            combine(chunk, np.frombuffer(buffer, little, len(chunk)), out=chunk)


def zeros(length: int, ring_bits: int) -> RingVector:
    """The vector that a sum begins with: 16-bit values, or 32-bit values for the rings of 24 and 32 bits."""
    return np.zeros(length, np.uint16) if ring_bits == 16 else np.zeros(length, np.uint32)


def cut(vector: RingVector, ring_bits: int) -> None:
    """Reduce a vector to its ring, in place: one of 24 bits is computed in 32, of which it is a divisor."""
    if ring_bits == 24:
        np.bitwise_and(vector, 0xFFFFFF, out=vector)
