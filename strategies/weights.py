"""The weight of a site's update in the mean, as `aggregation.weights` says, and the most that it can be. Pure."""

from __future__ import annotations

import math

from core_training.foundation.trainable import TrainReport
from core_training.recipe.schema import Recipe
from strategies.fedavg import most_weight


def weight_in_mean(recipe: Recipe, report: TrainReport, records: int, site: str) -> float:
    """The weight of what a slice of training led to, at a site of this name that announced so many training records.

    0 where the slice learnt from nothing, whatever the recipe says; but for differential privacy, under which nobody is
    to know.
    """
    if report.weight == 0 and recipe.privacy.differential_privacy is None:
        return 0.0
    match recipe.aggregation.weights:
        case "records":
            return float(records)
        case "sqrt_records":
            return math.sqrt(records)
    return float(known_weight(recipe, site) or report.weight)


def known_weight(recipe: Recipe, site: str) -> int | None:
    """The weight that the recipe alone gives a site's updates; None where it goes by what the site did."""
    match recipe.aggregation.weights:
        case "equal":
            return 1
        case "given":
            return recipe.aggregation.site_weights.get(site, 1)
    return None


def most_weight_in_mean(recipe: Recipe, steps: int) -> int:
    """The most that any site's weight can be after `steps` optimizer steps, where the recipe says as much.

    That is not so of records, of which a site has as many as it announced: rings and gossip, which need to know the
    most beforehand, are not weighted by them.
    """
    return most_known_weight(recipe) or most_weight(recipe, steps)


def most_known_weight(recipe: Recipe) -> int | None:
    """The most that any site weighs, where the recipe alone says it; None where it goes by what a site did."""
    match recipe.aggregation.weights:
        case "equal":
            return 1
        case "given":
            return max(1, *recipe.aggregation.site_weights.values())
    return None
