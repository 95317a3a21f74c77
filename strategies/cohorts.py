"""Which idle sites begin together, where rounds are asynchronous and only sums over several sites are seen. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from core_training.recipe.schema import Recipe
from strategies.draws import key_of

_QUICKEST, _SLOWEST = 1e-3, 1e9
"""Seconds; beyond them nobody is told apart."""


def cohorts_of(
    recipe: Recipe, number: int, idle: Collection[str], parts: Mapping[str, int], seconds: Mapping[str, float]
) -> list[list[str]]:
    """Cohorts of `topology.buffer` idle sites in round `number`; the rest waits for others.

    Who was in the fewest rounds (`parts`) comes first, with those whose pace is most alike, as a cohort waits for its
    slowest: `seconds` is what sites last took. Paces within a factor of √2 are taken for the same, and a hash decides,
    so that cohorts mix.
    """
    size, seed = recipe.topology.buffer or len(idle), recipe.training.seed
    drawn = {site: key_of("cohorts", seed, number, site) for site in idle}
    waiting = sorted(idle, key=lambda site: (parts.get(site, 0), drawn[site]))
    cohorts = []
    while len(waiting) >= size:
        first = waiting[0]
        apart = {site: _apart(seconds.get(first), seconds.get(site)) for site in waiting}
        cohort = [first, *sorted(waiting[1:], key=lambda site: (apart[site], drawn[site]))[: size - 1]]
        waiting = [site for site in waiting if site not in cohort]
        cohorts.append(sorted(cohort))
    return cohorts


def _apart(first: float | None, second: float | None) -> int:
    """How many factors of two lie between two paces; 0 where one is not known."""
    if first is None or second is None:
        return 0
    return abs(round(math.log2(_clamped(first)) - math.log2(_clamped(second))))


def _clamped(seconds: float) -> float:
    """A site's own word, which may be any number."""
    return min(max(seconds, _QUICKEST), _SLOWEST)
