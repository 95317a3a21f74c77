"""The sites that a recipe names: a name that nobody has would be without effect, and without a word."""

from __future__ import annotations

from collections.abc import Collection

from core_training.foundation.errors import InputError
from core_training.parts.tuning_modes.lora import LORA
from core_training.recipe.schema import Recipe


def check_named_sites(recipe: Recipe, sites: Collection[str]) -> None:
    """Raise InputError, with the key, for a name that none of the run's sites has."""
    if recipe.topology.kind == "central":
        return
    named = {
        "topology.judged_by": recipe.topology.judged_by,
        "aggregation.site_weights": list(recipe.aggregation.site_weights),
        "tuning.lora.site_ranks": list(recipe.tuning.settings(LORA).site_ranks) if recipe.trains_parts else [],
    }
    for key, names in named.items():
        if unknown := sorted(set(names) - set(sites)):
            raise InputError(f"{key}: the run has no site '{unknown[0]}'; it has {', '.join(sorted(sites))}")
