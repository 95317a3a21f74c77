"""What of an adapter B·A trains in a round, and what of it travels: a function of the round's number for each way.

The mean of products is not the product of means: where one factor is alike at all sites, the mean of the other is exact
(Sun et al. 2024, FFA-LoRA). All other trained tensors, such as heads, always train and travel. Pure, and known to all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from core_training.foundation.errors import InputError
from core_training.foundation.state import Manifest, TrainableState
from core_training.foundation.trainable import TrainedPart
from core_training.parts.tuning_modes.lora import LORA
from core_training.recipe.schema import Recipe

_FACTOR = re.compile(r"\.lora_(?:embedding_)?([AB])(?:\.|$)")


@dataclass(frozen=True)
class Turn:
    """The factors that train in a round, and those that travel: `A`, `B` or `AB`."""

    trains: str = "AB"
    travels: str = "AB"


Turns: TypeAlias = Callable[[int], Turn]
"""The turn of round 1, 2, …; of 0, what differs between the run's start and any later state."""


def both(_number: int) -> Turn:
    """Both factors train and travel, each averaged by itself (Zhang et al. 2024, FedIT)."""
    return Turn()


def ffa(_number: int) -> Turn:
    """A stays as it began, alike at all sites (Sun et al. 2024, FFA-LoRA)."""
    return Turn("B", "B")


def rolora(number: int) -> Turn:
    """B and A take turns (Chen et al. 2024, RoLoRA)."""
    if number == 0:
        return Turn()
    return Turn("B", "B") if number % 2 else Turn("A", "A")


def fedsa(_number: int) -> Turn:
    """A is everybody's, and each site's B its own (Guo et al. 2024, FedSA-LoRA)."""
    return Turn("AB", "A")


def fedsvd(number: int) -> Turn:
    """B alone trains and travels, and the server makes both factors anew (Lee et al. 2025, FedSVD)."""
    return Turn("B", "B") if number else Turn()


def turn_of(recipe: Recipe, number: int) -> Turn:
    """The recipe's turn in round `number`."""
    turns: Turns = recipe.aggregation.sharing_part.load()
    return turns(number)


def travels(recipe: Recipe, manifest: Manifest, number: int) -> tuple[bool, ...] | None:
    """For each tensor whether it travels in round `number`; None where all do."""
    turn = turn_of(recipe, number)
    chosen = tuple(_factor(spec.name) in turn.travels for spec in manifest.tensors)
    return None if all(chosen) else chosen


def trained_part(recipe: Recipe, manifest: Manifest, number: int, site: str) -> TrainedPart:
    """What this site's slice of round `number` may change.

    Raises InputError where the site has a rank of its own and an adapter's components do not lie in rows.
    """
    turn = turn_of(recipe, number)
    frozen = frozenset(spec.name for spec in manifest.tensors if _factor(spec.name) not in turn.trains)
    settings = recipe.tuning.settings(LORA)
    rank = settings.site_ranks.get(site, settings.r)
    if rank == settings.r or not recipe.tuning_part.has_factors:
        return TrainedPart(frozen)
    first = {}
    for spec in manifest.tensors:
        if (factor := _factor(spec.name)) and spec.name not in frozen:
            axis = 0 if factor == "A" else 1
            if spec.shape[axis] != settings.r:
                raise InputError(
                    f"tuning.lora.site_ranks: '{spec.name}' holds the components of several experts, one after the "
                    "other; set tuning.lora.experts to false, or leave out the ranks"
                )
            first[spec.name] = (axis, rank)
    return TrainedPart(frozen, first)


def remade(recipe: Recipe, state: TrainableState) -> TrainableState:
    """The state of a round as it is committed, where the recipe has a server make adapters anew; else as it is.

    Raises InputError for adapters that cannot be made anew.
    """
    remake = recipe.aggregation.sharing_part.load_remaker()
    return state if remake is None else remake(state, recipe.tuning.settings(LORA).r)


def keeps_own(recipe: Recipe) -> bool:
    """Whether a part of the state is each site's own."""
    return recipe.topology.kind != "central" and recipe.aggregation.sharing_part.keeps_own


def with_own(recipe: Recipe, common: TrainableState, own: TrainableState) -> TrainableState:
    """The common state with what never travels taken from `own`."""
    merged = TrainableState(common.manifest, common.buffer.copy())
    values = dict(own.tensors())
    for (name, view), shared in zip(merged.tensors(), _ever_shared(recipe, common.manifest), strict=True):
        if not shared:
            view[...] = values[name]
    return merged


def _ever_shared(recipe: Recipe, manifest: Manifest) -> tuple[bool, ...]:
    """For each tensor whether it travels in any round."""
    return travels(recipe, manifest, 0) or (True,) * len(manifest.tensors)


def _factor(name: str) -> str:
    """`A` or `B`; empty, and so in every turn, for what is no factor of an adapter."""
    found = _FACTOR.search(name)
    return found.group(1) if found else ""
