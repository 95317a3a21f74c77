"""What can be said of an aggregation rule without loading it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from core_training.parts.registry import Part, S


@dataclass(frozen=True, kw_only=True)
class AggregationPart(Part[S]):
    """The facts of an aggregation rule; `target` is its `strategies.aggregation_rule.AggregationRule`."""

    is_weighted_mean: bool = False
    """Whether its result is the mean, weighted as `aggregation.weights` says: a sum in a ring says that and no more."""
    needs_each_update: bool = False
    """Whether it looks at each update by itself, and so is for no run in which nobody sees one."""
    fewest: tuple[str, Callable[[Any], int]] | None = None
    """The key of its section that says how many updates it takes at least, and that number, of the section. Where it
    is `in_groups` these are groups."""
    needs_rank: bool = False
    """Whether it is for the factors of adapters, and made of their rank, too, after the manifest."""
    needs_start: bool = False
    """Whether it is made of the state that the round began with, too, after the manifest."""
    needs_steps: bool = False
    """Whether an update is added with the steps that its site took, after the weight."""
    required: tuple[str, ...] = ()
    """The keys of its section that have to be given."""
    in_groups: bool = False
    """Whether it is of one group of sites among several: nothing but sums over each has to be seen."""
    remembers: bool = False
    """Whether it is made of what it remembered of the rounds before and of the round's number as well, and has a new
    `memory` once it has a result."""
