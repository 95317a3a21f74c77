"""The recipe: the one YAML file that says what to train, how, and where.

Every key that a recipe may hold has its type, default and meaning in `sections` or, where it is a stage's, in its file
of `core_training.parts` (`docs/recipe.md` is made from them); which of them go together is in `combinations`. Paths are
relative to the folder the command is run in. How the file is read is in `reading`. No heavy libraries.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Self

import yaml
from pydantic import model_validator

from core_training.recipe.combinations import check_combinations
from core_training.recipe.recipe_keys import RecipeKeys


class Recipe(RecipeKeys):
    """The whole recipe."""

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        check_combinations(self)
        return self

    @property
    def engine_digest(self) -> str:
        """SHA-256 (hex) over what decides the training at a site: parties with one digest run the same recipe."""
        # What lies elsewhere at each site is compared by content instead: see `initial_digest` of an engine. The data,
        # a reward function and how its curve is kept are the site's own, and never compared.
        places: Any = dict.fromkeys(("model", "data", "deepspeed", "simulation", "output"), True)
        own = {"rollout": {"reward_model", "reward_function"}, "training": {"logging_steps", "report_to"}}
        parts = self.model_dump(exclude={**places, **own})
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def flat(self) -> dict[str, str | int | float | bool]:
        """The keys as people write overrides, with plain values (lists as JSON); those that are unset are left out."""
        return _flat(self.model_dump(), "")

    def to_yaml(self) -> str:
        """The recipe with every default written out."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def _flat(document: Mapping[str, Any], prefix: str) -> dict[str, str | int | float | bool]:
    flat: dict[str, str | int | float | bool] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value if isinstance(value, str | int | float | bool) else json.dumps(value)
    return flat
