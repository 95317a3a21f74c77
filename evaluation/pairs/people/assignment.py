"""Which pair an annotator sees next, and in which order: drawn from a seed, so the same after a kill. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from evaluation.pairs.pairwise import Shown


def shown_to(annotator: str, place: int, pairs: Sequence[Shown], *, twice: bool, seed: int = 0) -> list[Shown]:
    """What an annotator is to look at, in turn. `place` is the annotator's among all, from 0.

    The first order of a pair is drawn; annotators see it one way and the other by turns, so that both are seen. With
    `twice` each sees every pair in both orders, the second time behind all others.
    """
    drawn = sorted(pairs, key=lambda one: _drawn(seed, "turn", annotator, *one.key))
    first = [one.turned if (_drawn(seed, "order", *one.key) + place) % 2 else one for one in drawn]
    if not twice:
        return first
    again = sorted((one.turned for one in first), key=lambda one: _drawn(seed, "again", annotator, *one.key))
    return [*first, *again]


def _drawn(seed: int, *words: str) -> int:
    digest = hashlib.sha256("\n".join([str(seed), *words]).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")
