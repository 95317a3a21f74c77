"""How far judges agree beyond chance: Cohen's κ of two, Fleiss' κ of several. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from evaluation.pairs.pairwise import Look

_VOTES = (-1, 0, 1)


def cohen(one: Sequence[int], other: Sequence[int]) -> float | None:
    """Cohen's κ of two judges' categories of the same things (Cohen 1960).

    None over nothing, and where both always say one thing: chance alone would agree then.
    """
    if len(one) != len(other):
        raise ValueError("two judges' categories must be of the same things")
    if not one:
        return None
    ours, theirs = np.asarray(one), np.asarray(other)
    categories = sorted({*one, *other})
    by_chance = sum(float((ours == c).mean() * (theirs == c).mean()) for c in categories)
    return None if by_chance == 1 else (float((ours == theirs).mean()) - by_chance) / (1 - by_chance)


def fleiss(counts: Sequence[Sequence[int]]) -> float | None:
    """Fleiss' κ (Fleiss 1971) of counts of shape (things, categories), the same number of judges in each row.

    None over nothing, for one judge, and where all always say one thing. Raises ValueError for rows of unequal sums.
    """
    table = np.asarray(counts, dtype=np.float64)
    if not len(table):
        return None
    judges = table.sum(axis=1)
    if (judges != judges[0]).any():
        raise ValueError("each thing must have been judged by the same number of judges")
    if judges[0] < 2:
        return None
    observed = ((table * (table - 1)).sum(axis=1) / (judges * (judges - 1))).mean()
    by_chance = float(((table.sum(axis=0) / table.sum()) ** 2).sum())
    return None if by_chance == 1 else float((observed - by_chance) / (1 - by_chance))


def agreement(looks: Sequence[Look]) -> dict[str, Any] | None:
    """How far the judges of these looks agree on which model is better; None where there are not two.

    A judge who said otherwise of the other order found a tie. Cohen's κ is over what both of a pair of judges judged,
    Fleiss' over what all did.
    """
    votes = votes_by_judge(looks)
    if len(votes) < 2:
        return None
    cohens = []
    for one, other in combinations(sorted(votes), 2):
        common = [pair for pair in votes[one] if pair in votes[other]]
        ours, theirs = ([votes[name][pair] for pair in common] for name in (one, other))
        agreed = sum(a == b for a, b in zip(ours, theirs, strict=True))
        cohens.append(
            {
                "annotators": [one, other],
                "pairs": len(common),
                "agreed": agreed / len(common) if common else None,
                "kappa": cohen(ours, theirs),
            }
        )
    first, *others = votes.values()
    all_judged = [pair for pair in first if all(pair in own for own in others)]
    rows = [[[own[pair] for own in votes.values()].count(vote) for vote in _VOTES] for pair in all_judged]
    return {
        "cohen": cohens,
        "fleiss": {"kappa": fleiss(rows), "pairs": len(rows), "annotators": len(votes)} if len(votes) > 2 else None,
    }


def votes_by_judge(looks: Sequence[Look]) -> dict[str, Mapping[tuple[str, str, str], int]]:
    """Each judge's vote on each pair; looks without a verdict are left out."""
    found: dict[str, dict[tuple[str, str, str], set[int]]] = {}
    for look in looks:
        if look.winner is not None:
            found.setdefault(look.by, {}).setdefault(look.pair, set()).add(look.vote)
    return {
        name: {pair: next(iter(said)) if len(said) == 1 else 0 for pair, said in own.items()}
        for name, own in found.items()
    }
