"""Shamir's secret sharing (1979) over a prime field: `threshold` shares give the secret, fewer say nothing about it.

The secret is the value at 0 of a polynomial with `threshold` coefficients, a share the value at a holder's number. The
work depends on how many there are, never on what they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

PRIME = 2**256 + 297  # the smallest prime above 2^256, so that any 32 bytes are a value


def evaluate(polynomial: Sequence[int], x: int, prime: int = PRIME) -> int:
    """The polynomial's value at `x`; its lowest coefficient, the secret, comes first."""
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * x + coefficient) % prime
    return value


def join(shares: Mapping[int, int], prime: int = PRIME) -> int:
    """The secret, from exactly `threshold` shares by holder's number (from 1 up): Lagrange interpolation at 0."""
    weights = _weights(tuple(shares), prime)
    return sum(weight * share for weight, share in zip(weights, shares.values(), strict=True)) % prime


@lru_cache(maxsize=4096)
def _weights(numbers: tuple[int, ...], prime: int) -> tuple[int, ...]:
    weights = []
    for own in numbers:
        over, under = 1, 1
        for other in numbers:
            if other != own:
                over = over * other % prime
                under = under * (other - own) % prime
        weights.append(over * pow(under, -1, prime) % prime)
    return tuple(weights)
