"""The sites of a round, where not all take part in each: a draw that anybody can make again. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection

from core_training.recipe.schema import Recipe
from strategies.draws import key_of


def drawn(recipe: Recipe, number: int, present: Collection[str], failed: Collection[str] = ()) -> list[str]:
    """The sites that are asked in round `number`, of those that are there: the first of an order by hash.

    The order is made of the recipe's seed, the round and the names, so a site that is away changes no other's place.
    Those that `failed` in an earlier attempt at the round come last.
    """
    wanted = wanted_sites(recipe, len(present))
    if wanted is None or recipe.topology.buffer is not None:
        return sorted(present)
    asked = math.ceil(wanted * (1 + recipe.topology.asked_beyond))
    seed = recipe.training.seed
    ordered = sorted(present, key=lambda name: (name in failed, key_of("participation", seed, number, name)))
    return sorted(ordered[:asked])


def wanted_sites(recipe: Recipe, present: int) -> int | None:
    """The updates that a round takes, of `present` sites; None where it takes all that come in time."""
    if recipe.topology.sites_per_round is None and recipe.topology.buffer is None:
        return None
    return min(max(recipe.topology.in_round(present), recipe.needed_sites), present)
