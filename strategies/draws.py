"""Pseudo-random numbers that every machine draws alike, for stochastic rounding and for the choice of values to send.

The choice is public, the rounding as secret as its key. AES-128 in counter mode, so that the numbers of one place in a
state are the same however the state is cut into pieces before it.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES128
from cryptography.hazmat.primitives.ciphers.modes import CTR

PIECE = 1 << 16
"""Values worked on at a time: their float64 temporaries stay in a core's cache."""

_KEY_BYTES = 16


def key_of(purpose: str, *parts: int | str) -> bytes:
    """A key for `draws`; another for any other purpose or parts."""
    return hashlib.sha256(json.dumps([purpose, *parts]).encode()).digest()[:_KEY_BYTES]


def rounding_key(seed: int, secret: str, round: int) -> bytes:
    """The key of one site's rounding in one round; `seed` is the recipe's, `secret` the site's own.

    Whoever knew how each site rounds could tell, where one value of a sum is 1, which site it is of.
    """
    return key_of("rounding", seed, secret, round)


def noise_key(secret: str, run_id: str, round: int, start: str, trained: str) -> bytes:
    """The key of the noise on one site's update in a round, from the digests of the states before and after it.

    The same update has the same noise however often a round asks for it, and no other has it: the difference of two
    would be without noise. So would that of two runs' sums be, of which one lacks a site.
    """
    return key_of("noise", secret, run_id, round, start, trained)


def draws(key: bytes, place: int, count: int) -> npt.NDArray[np.uint16]:
    """`count` numbers of 16 bits, uniform and independent, for the piece that begins at `place` of a state."""
    stream = Cipher(AES128(key), CTR(place.to_bytes(8, "big") + bytes(8))).encryptor()
    return np.frombuffer(stream.update(bytes(2 * count)), dtype="<u2")
