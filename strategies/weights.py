"""The weight of a site's update in the mean, as `aggregation.weights` says, and the most that it can be. Pure."""

from __future__ import annotations

import math

from core_training.foundation.trainable import TrainReport
from core_training.recipe.schema import Recipe
from strategies.fedavg import most_weight


def weight_in_mean(recipe: Recipe, report: TrainReport, records: int) -> float:
    """The weight of what a slice of training led to, at a site that announced so many training records.

    0 where the slice learnt from nothing, whatever the recipe says.
    """
    if report.weight == 0:
        return 0.0
    match recipe.aggregation.weights:
        case "records":
            return float(records)
        case "sqrt_records":
            return math.sqrt(records)
        case "equal":
            return 1.0
    return float(report.weight)


def most_weight_in_mean(recipe: Recipe, steps: int) -> int:
    """The most that any site's weight can be after `steps` optimizer steps, where the recipe says as much.

    That is not so of records, of which a site has as many as it announced: rings and gossip, which need to know the
    most beforehand, are not weighted by them.
    """
    return 1 if recipe.aggregation.weights == "equal" else most_weight(recipe, steps)
