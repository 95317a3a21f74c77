"""Full tuning: every parameter is trained, and every parameter travels."""

from __future__ import annotations

from typing import Any

from core_training.recipe.schema import Recipe


def apply(model: Any, recipe: Recipe) -> Any:
    model.requires_grad_(True)
    return model
