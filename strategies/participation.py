"""The sites of a round, where not all take part in each: a draw that anybody can make again. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection

from core_training.recipe.schema import Recipe
from strategies.draws import key_of


def drawn(recipe: Recipe, number: int, present: Collection[str]) -> list[str]:
    """The sites that are asked in round `number`, of those that are there: the first of an order by hash.

    The order is made of the recipe's seed, the round and the names, so a site that is away changes no other's place.
    """
    wanted = wanted_sites(recipe, len(present))
    if wanted is None:
        return sorted(present)
    asked = math.ceil(wanted * (1 + recipe.topology.asked_beyond))
    ordered = sorted(present, key=lambda name: key_of("participation", recipe.training.seed, number, name))
    return sorted(ordered[:asked])


def wanted_sites(recipe: Recipe, present: int) -> int | None:
    """The updates that a round takes, of `present` sites; None where it takes all that come in time."""
    wanted = recipe.topology.sites_per_round
    if wanted is None:
        return None
    share = wanted if isinstance(wanted, int) else math.ceil(wanted * present)
    return min(max(share, recipe.needed_sites), present)
