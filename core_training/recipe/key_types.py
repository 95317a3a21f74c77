"""The types of a recipe's keys, by their names with dots."""

from __future__ import annotations

from typing import Any, get_args

from core_training.recipe.schema import Recipe


def type_of(key: str) -> Any:
    """The type of a key that every recipe has, a section's class for a section; None for any other name."""
    kind: Any = Recipe
    for part in key.split("."):
        known = getattr(kind, "model_fields", {})
        if part not in known:
            return None
        kind = without_wrapping(known[part].annotation)
    return kind


def without_wrapping(annotation: Any) -> Any:
    """The section's class in an annotation such as `Section | None`; any other annotation as it is."""
    return next((one for one in get_args(annotation) if hasattr(one, "model_fields")), annotation)
