"""Random numbers that nobody can foresee: AES in counter mode (NIST SP 800-38A), under a key of the system's.

PyTorch and NumPy draw from generators whose state follows from what they gave, so that noise of theirs could be taken
off again. Each stream has a key of its own, which is forgotten with it. Noise is of double precision: what its last
bits tell of the sum below (Mironov 2012) is not hidden.
"""

from __future__ import annotations

import math
import os

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_PIECE = 1 << 18
"""Values that are drawn at once: the memory stays small however many are asked for."""


class SecretRandom:
    """A stream of random numbers. Without a `key` (16 or 32 bytes, secret) it is the operating system's."""

    def __init__(self, key: bytes | None = None) -> None:
        cipher = Cipher(algorithms.AES(key or os.urandom(32)), modes.CTR(bytes(16)))
        self._encryptor = cipher.encryptor()

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """So many numbers in (0, 1], each a multiple of 2^-53."""
        words = np.frombuffer(self._encryptor.update(bytes(8 * count)), dtype="<u8")
        return ((words >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-53

    def normal(self, count: int) -> npt.NDArray[np.float64]:
        """So many numbers of the standard normal distribution (Box and Muller 1958)."""
        values = np.empty(count, dtype=np.float64)
        for start in range(0, count, _PIECE):
            piece = values[start : start + _PIECE]
            pairs = (len(piece) + 1) // 2
            radius = np.sqrt(-2 * np.log(self.uniform(pairs)))
            angle = 2 * np.pi * self.uniform(pairs)
            piece[:pairs] = radius * np.cos(angle)
            piece[pairs:] = (radius * np.sin(angle))[: len(piece) - pairs]
        return values

    def discrete_normal(self, count: int, deviation: float) -> npt.NDArray[np.int64]:
        """So many numbers of the discrete Gaussian of this parameter (Canonne, Kamath and Steinke 2020, algorithm 3).

        Drawn from a discrete Laplace distribution, and kept with the probability that makes up the difference.
        """
        width = math.floor(deviation) + 1
        values = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            tries = 2 * (count - done) + 64
            # The difference of two geometric numbers is a discrete Laplace number.
            first, second = (np.floor(-width * np.log(self.uniform(tries))) for _ in range(2))
            candidates = first - second
            likely = np.exp(-((np.abs(candidates) - deviation**2 / width) ** 2) / (2 * deviation**2))
            kept = candidates[self.uniform(tries) <= likely][: count - done]
            values[done : done + len(kept)] = kept
            done += len(kept)
        return values

    def drawn(self, count: int, rate: float) -> npt.NDArray[np.int64]:
        """The numbers below `count` that are drawn, each by itself with probability `rate`, in order."""
        return np.flatnonzero(self.uniform(count) <= rate)
